"""The networks and the config. References: numpy in float64, hand counts, symmetries; and every shape comment is executed."""
import ast
import inspect
import io
import math
import re
import sys
import textwrap
import tokenize
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import data
import flow
import model as nets
import train
from conftest import TINY


def perturb(net, std=0.1, seed=0):
    """Add noise to every number of a net, so that nothing is zero, one or equal by luck."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for w in net.parameters():
            w += std * torch.randn(w.shape, generator=g)
    return net


def small_dit(motion=False, seed=0):
    """C 3, T 2, H 4, W 6, D 24; the motion half, where wanted, is added before the weights are perturbed."""
    torch.manual_seed(seed)
    return perturb(nets.DiT(3, 2, 4, 6, dim=24, depth=2, heads=2, hidden=40, text_dims=[10], motion=motion))


def inputs(channels=3, B=2, L=5, seed=1):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g)
    return rand(B, channels, 2, 4, 6), rand(B).sigmoid(), rand(B, L, 10), torch.arange(L) < torch.arange(L, L - B, -1)[:, None]


# ---- Config ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("preset, width, depth", [("4b", 3072, 32), ("30b", 6144, 48)])
def test_paper_presets(preset, width, depth):
    """App. C. Reference: the paper's numbers, typed again here."""
    c = common.load_config([f"preset={preset}"])
    assert (c["dit"]["dim"], c["dit"]["depth"]) == (width, depth) and width // c["dit"]["heads"] == 128
    assert (c["frames"], c["height"], c["width"], c["fps"]) == (128, 256, 256, 24)
    assert (c["tae"]["spatial"], c["tae"]["temporal"], c["tae"]["channels"], c["dit"]["patch"]) == (8, 8, 16, 2)
    assert common.latent_size(c) == (16, 16, 32, 32)
    assert c["videojam"] == {"steps": 50000 if preset == "4b" else 35000, "lr": 5e-6}
    assert c["batch"] == (32 if preset == "4b" else 256) and c["text"]["frozen"] == [4096, 1472, 1280]
    assert (c["drop_text"], c["drop_motion"], c["sample"]["steps"], c["sample"]["w_text"], c["sample"]["w_motion"]) == (0.3, 0.2, 100, 5, 3)


def test_every_preset_resolves_and_names_its_run():
    """Promise of load_config: the four presets pass `check`, all with the same keys; tiny is the default; run is runs/<preset>."""
    keys = None
    for preset in ("tiny", "small", "4b", "30b"):
        c = common.load_config([f"preset={preset}"])
        assert c["preset"] == preset and c["run"] == f"runs/{preset}"
        keys = keys or common.flatten(c).keys()
        assert common.flatten(c).keys() == keys
    assert common.load_config() == common.load_config(["preset=tiny"])
    assert common.load_config(["preset=small", "run=here"])["run"] == "here"


def test_overrides_have_the_last_word_and_do_not_stick():
    """An override beats the preset wherever it stands in the list; the next call starts from the file again."""
    assert common.load_config(["dit.depth=3", "preset=4b"])["dit"]["depth"] == 3
    assert common.load_config(["preset=4b"])["dit"]["depth"] == 32


@pytest.mark.parametrize("text, number", [("1e-4", 1e-4), ("1.0e-4", 1e-4), ("3", 3.0), ("2E2", 200.0)])
def test_numbers_are_read_as_floats(text, number):
    """PyYAML reads 1e-4 as a string and 3 as an int; the key is a float. Reference: Python's own float()."""
    found = common.load_config([f"base.lr={text}"])["base"]["lr"]
    assert type(found) is float and found == number


@pytest.mark.parametrize("override, expected", [
    ("base.step=5", "did you mean 'base.steps'"),
    ("hieght=64", "did you mean 'height'"),
    ("dit.dept=3", "did you mean 'dit.depth'"),
    ("world=3", "unknown key 'world'"),
    ("qqqqqq=1", "unknown key 'qqqqqq'"),
    ("frames=many", "frames='many' is a str, expected a int"),
    ("frames=16.5", "frames=16.5 is a float"),
    ("seed=true", "seed=True is a bool"),
    ("plan=1", "plan=1 is a int, expected a bool"),
    ("base.lr=fast", "base.lr='fast'"),
    ("base.lr=true", "base.lr=True"),
    ("tae.widths=3", "tae.widths=3 is a int, expected a list"),
    ("frames=", "frames=''"),
    ("preset=huge", "expected one of tiny, small, 4b, 30b"),
    ("small", "no key=value pair"),
    ("height=33", "height=33 does not divide by"),
    ("dit.dim=100 dit.heads=3", "dit.dim=100 does not divide by dit.heads=3"),
    ("text.dim=100 text.heads=3", "text.dim=100 does not divide by text.heads=3"),
    ("tae.temporal=4 tae.tile=12", "tae.tile=12 does not divide by 2 x tae.temporal = 8"),
    ("tae.widths=[16,36,64]", "widths 16, 36"),
    ("tae.blocks=[1,1,1] tae.widths=[16,32,64]", "tae.blocks"),
    ("guide_motion=maybe", "guide_motion=maybe, expected text or literal"),
    ("frames=0", "frames=0, expected at least 1"),
    ("base.steps=-1", "base.steps=-1 is negative"),
    # numbers that would only fail after minutes of training, or with a traceback
    ("tae.widths=[16,a,64]", "tae.widths"),
    ("tae.widths=[16,32,72]", "72"),
    ("tae.spatial=16 height=64 width=64", "16"),
    ("tae.spatial=3 height=96 width=96", "3"),
    ("log_every=0", "log_every=0"),
    ("save_every=0", "save_every=0"),
    ("sample.steps=1", "sample.steps=1"),
    ("text.length=0", "text.length=0"),
    ("drop_text=1.5", "drop_text=1.5"),
    ("text.heads=0", "text.heads=0"),
    ("tae.spatial=0", "tae.spatial=0"),
    ("tae.tile=0", "tae.tile=0"),
    ("tae.widths=[0,0,0]", "tae.widths"),
    ("t_mean=.nan", "t_mean=nan"),
    ("flow.sigma=0", "flow.sigma=0"),
    ("world.size=7", "world.size=7"),
    ("world.basic=7", "world.basic=7"),
    ("seed=12345678901234567890123456", "seed=1234"),
    ("sample.steps=40 sample.emulated=30", "sample.emulated=30"),
    ("frames=[", "frames"),
    ("stages=", "stages"),
])
def test_a_bad_override_is_refused_in_one_line(override, expected):
    """Point 6 of the issue: unknown keys name the nearest, types and sizes are checked. Reference: the words that the reader needs."""
    with pytest.raises(ValueError) as error:
        common.load_config(["preset=tiny", *override.split()])
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_builders_follow_the_config():
    """build_tae, build_text and build_dit size the nets by the config: shapes of one tiny clip on its whole way."""
    c = common.load_config([*TINY, "frames=10"])
    tae, text, dit = common.build_tae(c), common.build_text(c), common.build_dit(c)
    z = tae.encode(torch.zeros(1, 3, 10, 16, 16))
    assert tuple(z.shape[1:]) == common.latent_size(c) == (4, 3, 4, 4)
    assert dit(z, torch.zeros(1), *text(["hello"])).shape == z.shape
    assert common.build_dit(c, motion=True)(torch.cat([z, z], 1), torch.zeros(1), *text(["hello"])).shape == (1, 8, 3, 4, 4)


# ---- Sizes ----------------------------------------------------------------------------------------------------------

def count(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("preset, billions", [("4b", 4.92), ("30b", 29.3)])
def test_parameters_of_the_papers_models(preset, billions):
    """Choice 6: 4.92 B and 29.3 B parameters (within 1 %), motion included. Second reference: the big matrices counted by hand,
    per block 4 D² + 4 D² attention and 3 D F SwiGLU, shared 6 D² modulation + D² time; the rest is under 1 %."""
    c = common.load_config([f"preset={preset}"])
    with torch.device("meta"):
        found = count(common.build_dit(c, motion=True))
    D, hidden, depth = c["dit"]["dim"], c["dit"]["hidden"], c["dit"]["depth"]
    assert found == pytest.approx(billions * 1e9, rel=0.01)
    assert found == pytest.approx(depth * (8 * D * D + 3 * D * hidden) + 7 * D * D, rel=0.01)


def test_motion_costs_two_matrices():
    """Sec. 4.2: W_in and W_out grow by C p² x D numbers each. Reference: that product, 2 x 3 x 2 x 2 x 24."""
    dit = small_dit()
    before = count(dit)
    assert count(dit.add_motion()) - before == 2 * 3 * 2 * 2 * 24


# ---- The surgery, sec. 4.2 ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [0.0, 1.0, 1e6])
def test_surgery_changes_nothing_to_the_last_bit(size):
    """Sec. 4.2: after add_motion the net is the base DiT for any d. Reference: the same net before, all weights perturbed; torch.equal."""
    dit, (x, t, text, mask) = small_dit(), inputs()
    before, names = dit(x, t, text, mask), dict(dit.state_dict())
    names = {name: w.clone() for name, w in names.items()}
    assert before.abs().min() > 0
    dit.add_motion()
    d = size * torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    after = dit(torch.cat([x, d], 1), t, text, mask)
    assert torch.equal(after[:, :3], before) and after.shape == (2, 6, 2, 4, 6)
    now = dit.state_dict()
    assert all(torch.equal(now[name], w) for name, w in names.items()) and set(now) - set(names) == {"motion_in.weight", "motion_out.weight"}


def test_both_new_matrices_learn():
    """Sec. 4.2 trains all weights, and neither new matrix may block the other for good: under Eq. 6 both get a gradient, W_out+ at once,
    W_in+ through the appearance half. Reference: a finite difference of the loss along each gradient, 2 % for float64's curvature."""
    dit, (x, t, text, mask) = small_dit().add_motion().double(), inputs(6)
    g = torch.Generator().manual_seed(2)
    v, keep = torch.randn(x.shape, generator=g).double(), torch.tensor([True, False])
    loss = lambda: (lambda u: ((u - v)[:, :3].square().mean((1, 2, 3, 4)) + keep * (u - v)[:, 3:].square().mean((1, 2, 3, 4))).mean())(
        dit(x.double(), t, text.double(), mask))
    train.joint_loss(dit(x.double(), t, text.double(), mask), v, keep).backward()
    for weight in (dit.motion_in.weight, dit.motion_out.weight):
        gradient, step = weight.grad, 1e-3
        assert gradient.norm() > 1e-4 and (gradient.abs().sum(1) > 0).all()
        with torch.no_grad():
            base, slope = loss(), gradient.norm()
            weight += step * gradient / slope
            rise = (loss() - base) / step
            weight -= step * gradient / slope
        assert rise.item() == pytest.approx(slope.item(), rel=0.02)
    assert all(p.grad is not None for p in dit.parameters())


def test_the_widened_net_listens_to_d_once_trained():
    """The counterpart of the surgery: with W_in+ away from zero, d does matter to both halves (or the test above proves nothing)."""
    dit, (z, t, text, mask) = small_dit(motion=True), inputs(6)
    z2 = torch.cat([z[:, :3], z[:, 3:] + 1], 1)
    change = (dit(z2, t, text, mask) - dit(z, t, text, mask)).abs().amax((0, 2, 3, 4))
    assert (change > 1e-3).all()


# ---- DiT ------------------------------------------------------------------------------------------------------------

def numpy_dit(dit, x, t, text, mask):
    """Eq. 4 and App. C written out in float64 numpy, token by token where the code reshapes."""
    w = {name: p.detach().double().numpy() for name, p in dit.named_parameters()}
    x, text, mask = x.double().numpy(), text.double().numpy(), mask.numpy()
    B, C, T, H, W = x.shape
    silu = lambda a: a / (1 + np.exp(-a))
    rms = lambda a, name: a / np.sqrt((a * a).mean(-1, keepdims=True) + np.finfo(np.float32).eps) * w[name]

    def attention(a, b, name, look):
        q, k, v = (y @ w[f"{name}.{part}.weight"].T for y, part in ((a, "q"), (b, "k"), (b, "v")))
        size, out = q.shape[-1] // 2, np.zeros_like(q)
        for n in range(B):
            for part in (slice(0, size), slice(size, 2 * size)):                # two heads
                score = q[n, :, part] @ k[n, look[n], part].T / math.sqrt(size)
                p = np.exp(score - score.max(-1, keepdims=True))
                out[n, :, part] = p / p.sum(-1, keepdims=True) @ v[n, look[n], part]
        return out @ w[f"{name}.out.weight"].T

    f = text @ w["text_in.0.weight"].T
    y = (f - f.mean(-1, keepdims=True)) / np.sqrt(f.var(-1, keepdims=True) + 1e-5) * w["text_norm.0.weight"]
    angle = 1000 * t.double().numpy()[:, None] * 10000.0 ** (-np.arange(128) / 128)
    e = silu(silu(np.concatenate([np.cos(angle), np.sin(angle)], -1) @ w["time.0.weight"].T) @ w["time.2.weight"].T)
    tokens = [(i, j, k) for i in range(T) for j in range(H // 2) for k in range(W // 2)]
    patch = lambda i, j, k: x[:, :, i, 2 * j:2 * j + 2, 2 * k:2 * k + 2].reshape(B, C * 4)
    h = np.stack([patch(*place) @ w["patch_in.weight"].T for place in tokens], 1)
    where = np.stack([w["pos_t"][i, 0, 0] + w["pos_h"][0, j, 0] + w["pos_w"][0, 0, k] for i, j, k in tokens])
    six, all_tokens = (e @ w["modulation.weight"].T).reshape(B, 6, -1), np.ones((B, len(tokens)), bool)
    for n in range(len(dit.blocks)):
        b = f"blocks.{n}."
        a1, b1, g1, a2, b2, g2 = np.moveaxis(six + w[b + "table"], 1, 0)[:, :, None]
        h = h + where
        own = rms(h, b + "norm1.weight") * (1 + a1) + b1
        h = h + g1 * attention(own, own, b + "attn", all_tokens)
        h = h + attention(rms(h, b + "norm2.weight"), y, b + "cross", mask)
        gate, value = ((rms(h, b + "norm3.weight") * (1 + a2) + b2) @ w[b + f"ffn.{part}.weight"].T for part in ("gate", "up"))
        h = h + g2 * ((silu(gate) * value) @ w[b + "ffn.down.weight"].T)
    a, b = np.moveaxis(e[:, None] + w["table"], 1, 0)[:, :, None]
    u = (rms(h, "norm.weight") * (1 + a) + b) @ w["patch_out.weight"].T
    out = np.zeros_like(x)
    for n, (i, j, k) in enumerate(tokens):
        out[:, :, i, 2 * j:2 * j + 2, 2 * k:2 * k + 2] = u[:, n].reshape(B, C, 2, 2)
    return out


def test_dit_is_equation_4():
    """Eq. 4 and App. C: W_in, positions at every block, self-attention, cross-attention under the mask, SwiGLU, shared modulation, W_out.
    Reference: numpy in float64, heads, tokens and patches in plain loops. 1e-4: float32 sines of angles up to 1000."""
    dit, args = small_dit(), inputs()
    torch.testing.assert_close(dit(*args).double(), torch.from_numpy(numpy_dit(dit, *args)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("motion", [False, True])
def test_dit_starts_as_the_zero_function(motion):
    """Zero-initialised gates and output: u = 0 exactly, for the base and for both halves of the joint net. Reference: zero."""
    dit = nets.DiT(3, 2, 4, 6, dim=24, depth=2, heads=2, hidden=40, text_dims=[10], motion=motion)
    assert not dit(*inputs(6 if motion else 3)).any()


def test_a_fresh_block_is_the_identity():
    """Gates and cross-attention of a fresh DiT are zero, so only W_out stands between the tokens and the output. Reference: its input."""
    dit = nets.DiT(3, 2, 4, 6, dim=24, depth=1, heads=2, hidden=40, text_dims=[10])
    h, y = torch.randn(2, 12, 24), torch.randn(2, 5, 24)
    assert torch.equal(dit.blocks[0](h, dit.modulation(torch.randn(2, 24)).unflatten(1, (6, -1)), y, torch.ones(2, 5, dtype=torch.bool)), h)


def test_patches_and_back():
    """Patches are 1 x p x p, channel slowest (Eq. 4). Reference: slices, and unpatchify undoes patchify."""
    dit, x = small_dit(), torch.randn(2, 3, 2, 4, 6)
    tokens = dit.patchify(x)
    assert torch.equal(tokens[1, 1, 0, 2], x[1, :, 1, 0:2, 4:6].flatten()) and tokens.shape == (2, 2, 2, 3, 12)
    assert torch.equal(dit.unpatchify(tokens), x)


def test_padding_of_the_text_does_not_show():
    """Masked text tokens are invisible: 1,000 times larger garbage behind the mask leaves u as it was (1e-5: another order of summation)."""
    dit, (x, t, text, mask) = small_dit(), inputs()
    garbage = torch.cat([text, 1000 * torch.randn(2, 4, 10)], 1)
    padded = dit(x, t, garbage, F.pad(mask, (0, 4)))
    torch.testing.assert_close(padded, dit(x, t, text, mask), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(dit(x, t, garbage, F.pad(mask, (0, 4), value=True)), padded, atol=1e-2)


def test_only_the_positions_know_the_place():
    """Full attention over all tokens has no order: with the positions at zero a shift of whole patches shifts u alike, along each axis;
    with them it does not. Reference: that symmetry. 1e-4: another order of summation, through two blocks."""
    dit, (x, t, text, mask) = small_dit(), inputs()
    moved = {axis: x.roll(step, axis) for axis, step in ((2, 1), (3, 2), (4, 2))}
    for axis, position in zip(moved, (dit.pos_t, dit.pos_h, dit.pos_w)):
        step = 1 if axis == 2 else 2
        roll_gap = lambda: (dit(moved[axis], t, text, mask) - dit(x, t, text, mask).roll(step, axis)).abs().max().item()
        assert roll_gap() > 1e-2
        with torch.no_grad():
            position.zero_()
        assert roll_gap() < 1e-4


def test_attention_is_bidirectional():
    """Every token sees every token: a change in the last frame reaches the first and the other way round."""
    dit, (x, t, text, mask) = small_dit(), inputs()
    for changed, seen in ((1, 0), (0, 1)):
        other = x.clone()
        other[:, :, changed] += 1
        assert (dit(other, t, text, mask) - dit(x, t, text, mask))[:, :, seen].abs().max() > 1e-4


def test_several_text_encoders_stand_side_by_side():
    """App. C: UL2, ByT5 and MetaCLIP are projected one by one and concatenated. With one encoder's mask all False it is as if absent:
    reference: the DiT of the others alone, with the same weights."""
    torch.manual_seed(0)
    three = perturb(nets.DiT(3, 2, 4, 6, dim=24, depth=2, heads=2, hidden=40, text_dims=[10, 7, 5]))
    one = nets.DiT(3, 2, 4, 6, dim=24, depth=2, heads=2, hidden=40, text_dims=[10])
    one.load_state_dict({k: v for k, v in three.state_dict().items() if k in one.state_dict()})
    x, t, text, mask = inputs()
    more, none = [torch.randn(2, 6, 7), torch.randn(2, 3, 5)], [torch.zeros(2, 6, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.bool)]
    torch.testing.assert_close(three(x, t, [text, *more], [mask, *none]), one(x, t, text, mask), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(three(x, t, [text, *more], [mask, none[0], ~none[1]]), one(x, t, text, mask), atol=1e-3)


@pytest.mark.parametrize("motion, shape", [(False, (1, 6, 2, 4, 6)), (True, (1, 3, 2, 4, 6)), (False, (1, 3, 2, 6, 4)), (False, (1, 3, 3, 4, 6))])
def test_dit_refuses_another_size(motion, shape):
    """A latent of another shape is refused with what was found and what was expected."""
    with pytest.raises(ValueError, match="found a latent of shape .*expected") as error:
        small_dit(motion)(torch.zeros(shape), torch.zeros(1), torch.zeros(1, 1, 10), torch.ones(1, 1, dtype=torch.bool))
    assert "\n" not in str(error.value)


# ---- Text -----------------------------------------------------------------------------------------------------------

def test_byte_ids_are_byt5s():
    """ByT5: byte + 3, pad 0, end 1. Reference: 'a' is 97, e acute is the bytes 195 and 169; the empty prompt is the end token alone."""
    text = nets.ByteText(8, 1, 2, 16)
    assert text.tokenize(["a", "é!", ""]).tolist() == [[100, 1, 0, 0], [198, 172, 36, 1], [1, 0, 0, 0]]
    assert text.tokenize([""]).tolist() == [[1]]
    features, mask = text(["a", "é!", ""])
    assert features.shape == (3, 4, 8) and mask.dtype == torch.bool
    assert mask.tolist() == [[True, True, False, False], [True] * 4, [True, False, False, False]]


def test_a_long_prompt_is_cut_with_a_warning():
    """The window holds length - 1 bytes and the end token: 7 bytes fit into 8, the eighth is cut, and said."""
    text = nets.ByteText(8, 1, 2, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert text.tokenize(["abcdefg"]).tolist() == [[*range(100, 107), 1]]
    for prompt in ("abcdefgh", "abcdefghijklmnop"):
        with pytest.warns(UserWarning, match="cut"):
            assert text.tokenize([prompt]).tolist() == [[*range(100, 107), 1]]


def test_features_of_a_prompt_do_not_depend_on_the_batch():
    """Padding is masked in the text encoder too: alone or beside a longer prompt, the same features (1e-5: order of summation)."""
    text = perturb(nets.ByteText(12, 2, 2, 32))
    alone, together = text(["red"])[0], text(["red", "a much longer prompt"])[0]
    torch.testing.assert_close(together[:1, :4], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(text(["der"])[0], alone, atol=1e-2)                # order matters: there are positions


def test_random_text_is_a_function_of_the_prompt():
    """The stand-in for frozen encoders: the widths of UL2, ByT5 and MetaCLIP, the same for the same prompt, different otherwise,
    also for prompts that share a beginning or an end, and without touching the global generator."""
    text, state = nets.RandomText([4096, 1472, 1280], 6), torch.get_rng_state()
    features, masks = text(["a red square moving right", "a red square moving left", "a blue square moving right"])
    assert torch.equal(torch.get_rng_state(), state)
    assert [tuple(f.shape) for f in features] == [(3, 6, 4096), (3, 6, 1472), (3, 6, 1280)] and all(m.all() for m in masks)
    again = text(["a red square moving right"])[0]
    for f, g in zip(features, again):
        assert torch.equal(f[:1], g)
        assert not torch.equal(f[0], f[1]) and not torch.equal(f[1], f[2])
        assert not torch.equal(f[0], f[2]), "two prompts with the same end have the same features"


# ---- TAE ------------------------------------------------------------------------------------------------------------

def small_tae(spatial=4, temporal=4, tile=32, std=0.05, seed=0):
    torch.manual_seed(seed)
    levels = int(math.log2(max(spatial, temporal)))
    return perturb(nets.TAE(4, (8, 8, 16, 16)[:levels + 1], (1, 0, 1)[:levels], spatial, temporal, tile), std).requires_grad_(False)


@pytest.mark.parametrize("T", [1, 7, 8, 9, 17])
@pytest.mark.parametrize("spatial, temporal", [(4, 4), (8, 8), (8, 4)])
def test_any_number_of_frames(spatial, temporal, T):
    """App. C: T frames give ceil(T / temporal) latents and come back as exactly T frames. Reference: math.ceil; appending frames leaves
    nothing undefined: the decoded clip is finite and in full shape."""
    tae, video = small_tae(spatial, temporal), torch.rand(2, 3, T, 16, 24) * 2 - 1
    z = tae.encode(video)
    assert z.shape == (2, 4, math.ceil(T / temporal), 16 // spatial, 24 // spatial)
    again = tae.decode(z, T)
    assert again.shape == video.shape and again.isfinite().all()
    with pytest.raises(ValueError, match="latent frames"):
        tae.decode(z, T + temporal)


@pytest.mark.parametrize("height, width", [(18, 16), (16, 18)])
def test_tae_refuses_a_size_that_does_not_divide(height, width):
    """Promise of the docstring: ValueError, one line, with the size and the factor."""
    with pytest.raises(ValueError, match=f"{width}x{height} pixels, expected multiples of 4"):
        small_tae().encode(torch.zeros(1, 3, 1, height, width))


@pytest.mark.parametrize("factors", [dict(spatial=3), dict(temporal=8), dict(spatial=8), dict(temporal=6)])
def test_tae_refuses_factors_it_cannot_build(factors):
    """Two halvings give factors 1, 2 and 4 only; anything else is a ValueError of the constructor."""
    with pytest.raises(ValueError, match="expected powers of two up to 4"):
        nets.TAE(4, (8, 8, 16), (0, 0), **factors)


def test_tae_refuses_widths_whose_shortcuts_do_not_divide():
    """The shortcuts deal a cell's channels evenly: 8 x 2 x 2 x 2 = 64 channels go into 16 but not into 24. Reference: that remainder."""
    nets.TAE(4, (8, 16), (0,), 2, 2)
    with pytest.raises(ValueError, match="24"):
        nets.TAE(4, (8, 24), (0,), 2, 2)


def test_it_starts_as_an_image_autoencoder():
    """Temporal convolutions start as the identity: a still clip has the latent of its one picture at every place in time, and every group
    of `temporal` decoded frames is the same. Reference: the picture, as a clip of one frame. 1e-5: other shapes, other summation."""
    torch.manual_seed(0)
    tae = nets.TAE(4, (8, 8, 16), (1, 1), 4, 4)
    picture = torch.rand(1, 3, 1, 16, 16) * 2 - 1
    z1, z = tae.encode(picture), tae.encode(picture.repeat(1, 1, 12, 1, 1))
    torch.testing.assert_close(z, z1.expand(-1, -1, 3, -1, -1), rtol=1e-5, atol=1e-5)
    video = tae.decode(z, 12)
    torch.testing.assert_close(video[:, :, 4:8], video[:, :, :4], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(video[:, :, :1], tae.decode(z1, 1), rtol=1e-5, atol=1e-5)


def test_a_pair_of_convolutions():
    """Movie Gen's 2-D then 1-D convolution, ends replicated. Reference: conv2d per frame, then a weighted sum of neighbouring frames."""
    conv = perturb(nets.Conv(2, 3, 2, 2))
    x = torch.randn(1, 2, 5, 6, 6)
    frames = torch.stack([F.conv2d(x[:, :, i], conv.space.weight, conv.space.bias, 2, 1) for i in range(5)], 2)
    expected = []
    for i in range(0, 5, 2):
        near = [frames[:, :, min(max(i + k, 0), 4)] for k in (-1, 0, 1)]
        expected.append(sum(torch.einsum("oc,bchw->bohw", conv.time.weight[:, :, k, 0], near[k]) for k in range(3)) + conv.time.bias[:, None, None])
    torch.testing.assert_close(conv(x), torch.stack(expected, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("s, t, T", [(2, 2, 6), (2, 2, 5), (2, 1, 3), (1, 2, 5)])
def test_shortcuts_copy_cells_to_channels_and_back(s, t, T):
    """Down's shortcut puts each t x s x s cell into the channels (an odd clip repeats its last frame), Up's puts it back: with the
    convolutions at zero and room for every number, Up undoes Down. Reference: the input."""
    down, up = nets.Down(2, 2 * t * s * s, s, t), nets.Up(2 * t * s * s, 2, s, t)
    for net in (down.conv, up.conv):
        for w in net.parameters():
            nn.init.zeros_(w)
    x = torch.randn(2, 2, T, 4, 6)
    again = up(down(x))
    assert torch.equal(again[:, :, :T], x)
    assert all(torch.equal(again[:, :, i], x[:, :, -1]) for i in range(T, again.shape[2]))
    mean = nets.Down(2, 2, s, t)
    for w in mean.conv.parameters():
        nn.init.zeros_(w)
    even = torch.cat([x, x[:, :, -1:]], 2) if T % t else x                      # and averages where there is no room
    torch.testing.assert_close(mean(x).mean(1), F.avg_pool3d(even, (t, s, s)).mean(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("s, t", [(2, 2), (2, 1), (1, 2)])
def test_up_convolves_the_nearest_neighbours(s, t):
    """Up's 2-D convolution sees each frame once, as copies in time come after it. Reference: copies in time and space first, then both convolutions."""
    up, x, seen = nets.Up(8, 4, s, t), torch.randn(2, 8, 3, 4, 6), []
    for w in up.conv.parameters():
        nn.init.zeros_(w)
    shortcut = up(x)                                                            # as above
    for w in up.conv.parameters():
        nn.init.normal_(w)
    copies = x.repeat_interleave(t, 2).repeat_interleave(s, 3).repeat_interleave(s, 4)
    expected = shortcut + up.conv(copies)
    up.conv.space.register_forward_hook(lambda net, inputs, output: seen.append(len(output)))
    torch.testing.assert_close(up(x), expected, rtol=1e-4, atol=1e-4)
    assert seen == [2 * 3]


def test_statistics_bring_either_stream_to_its_own_scale():
    """Choice 3: encode subtracts the mean and divides by the standard deviation of the stream asked for; decode undoes it.
    Reference: `moments` by hand, with statistics set by hand."""
    tae, video = small_tae(), torch.rand(2, 3, 8, 16, 16) * 2 - 1
    plain = tae.encode(video)                                                   # fresh statistics: mean 0, std 1
    torch.testing.assert_close(plain, tae.moments(video)[0])
    again = tae.decode(plain, 8)
    tae.statistics.copy_(torch.arange(1.0, 17).view(2, 2, 4))
    for motion in (False, True):
        mean, std = (8.0 * motion + torch.arange(1.0, 5) + 4 * k for k in (0, 1))
        z = tae.encode(video, motion)
        torch.testing.assert_close(z, (plain - mean.view(4, 1, 1, 1)) / std.view(4, 1, 1, 1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tae.decode(z, 8, motion), again, rtol=1e-3, atol=1e-3)
    assert "statistics" in tae.state_dict()


def test_long_clips_need_constant_memory():
    """App. C: tiles of 32 frames: no call of the encoder sees more than `tile` frames, none of the decoder more than tile / temporal latents,
    however long the clip. Reference: the sizes of all calls into every convolution; the encoder's tiles together are the clip."""
    tae, seen = small_tae(tile=8), {"in": [], "out": []}
    for module in tae.modules():
        if isinstance(module, nets.Conv):
            module.register_forward_pre_hook(lambda module, x, now=seen: now["now"].append(x[0].shape[2]))
    seen["now"] = seen["in"]
    z = tae.encode(torch.zeros(1, 3, 61, 8, 8))
    seen["now"] = seen["out"]
    assert tae.decode(z, 61).shape[2] == 61 and z.shape[2] == 16
    assert max(seen["in"]) == 8 and max(seen["out"]) == 8


@pytest.mark.parametrize("T", [8, 9, 12, 13, 16, 17, 31, 40])
def test_tiles_are_blended_linearly(T):
    """Decoding overlaps tiles by half (16 of 32 frames) with a linear blend. Reference: a decoder that paints its own number: the weight of a
    tile's frame grows by 1 / overlap per frame, symmetrically, and the weights of two neighbours add up to 1."""
    calls = []

    def numbered(z):
        calls.append(z.shape[2])
        return torch.full((1, 3, 4 * z.shape[2], 1, 1), len(calls) - 1.0)

    tae = nets.TAE(4, (8, 8, 16), (0, 0), 4, 4, tile=32)
    tae.reconstruct = numbered
    found = tae.decode(torch.zeros(1, 4, T, 1, 1), 4 * T)[0, 0, :, 0, 0].tolist()
    expected = [max(0, min((frame + 0.5) / 16 - 1, len(calls) - 1)) for frame in range(4 * T)]
    assert found == pytest.approx(expected, abs=1e-5)
    assert len(calls) == max(1, math.ceil((T - 8) / 4) + 1) and max(calls) == 8


def test_tiles_agree_with_the_whole_clip():
    """Tiled against untiled, temporal convolutions perturbed (the temporal attention of a fresh net is zero: it would look across a whole
    tile). Latents further than the receptive field from a seam are equal; decoded frames in the middle of an overlap or of a tile too.
    Reference: the same net with a tile as long as the clip. Receptive field: 8 convolutions at the lowest resolution and 3 above, 9 latents."""
    torch.manual_seed(0)
    tae = nets.TAE(4, (8, 8, 16), (0, 0), 4, 4)
    g = torch.Generator().manual_seed(0)
    for module in tae.modules():
        if isinstance(module, nets.Conv):
            for w in module.parameters():
                w.data += 0.1 * torch.randn(w.shape, generator=g)
    tae.requires_grad_(False)
    video = torch.rand(1, 3, 320, 8, 8, generator=g) * 2 - 1
    tae.tile = 320
    whole = tae.encode(video)
    video2 = tae.decode(whole, 320)
    tae.tile = 160
    tiled, decoded = tae.encode(video), tae.decode(whole, 320)
    gap = (tiled - whole).abs().amax((0, 1, 3, 4)) / whole.abs().max()         # seam between latents 39 and 40; relative: no norm bounds the size
    assert gap[:31].max() < 1e-5 and gap[49:].max() < 1e-5 and gap[38:42].max() > 1e-4
    gap = (decoded - video2).abs().amax((0, 1, 3, 4)).view(80, 4).amax(1) / video2.abs().max()    # tiles start at latents 0, 20, 40
    assert gap[:20].max() < 1e-5 and gap[29:31].max() < 1e-5 and gap[49:51].max() < 1e-5 and gap[60:].max() < 1e-5
    assert gap.max() > 1e-4


def the_gradients_written_by_hand(dtype, rounded):
    """(ours, the plain formula, inputs) of model.Gated, of model.Norm with a modulation per clip, and of it with its weight alone; the same numbers in any dtype."""
    torch.manual_seed(0)
    randn = lambda *shape: torch.randn(shape, dtype=torch.float64).to(rounded).to(dtype).requires_grad_()
    gate, value, W, x, scale, shift = randn(2, 5, 7), randn(2, 5, 7), randn(3, 7), randn(2, 5, 6), randn(2, 1, 6), randn(2, 1, 6)
    norm = nets.Norm(6)
    norm.weight = torch.nn.Parameter(randn(6).detach())
    plain_norm = lambda x: F.rms_norm(x, (6,), norm.weight, torch.finfo(torch.float32).eps)
    return [(nets.Gated.apply, lambda gate, value, W: F.linear(F.silu(gate) * value, W), (gate, value, W)),
            (norm, lambda x, scale, shift: plain_norm(x) * (1 + scale) + shift, (x, scale, shift)),
            (lambda x, weight: norm(x), lambda x, weight: plain_norm(x), (x, norm.weight))]


def test_the_gradients_written_by_hand():
    """model.Gated and model.Normed. References: finite differences in float64, and autograd's own of the plain formulas."""
    for ours, plain, inputs in the_gradients_written_by_hand(torch.float64, torch.float64):
        torch.autograd.gradcheck(ours, inputs)
        y, reference = ours(*inputs), plain(*inputs)
        torch.testing.assert_close(y, reference)
        grad = torch.randn_like(y)
        torch.testing.assert_close(torch.autograd.grad(y, inputs, grad), torch.autograd.grad(reference, inputs, grad))


@pytest.mark.parametrize("dtype, autocast", [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)])
def test_the_gradients_written_by_hand_in_bf16(dtype, autocast):
    """The same alone, under autocast (bf16 products, fp32 weights) and with bf16 weights (FSDP): the gradients have their inputs' dtypes, and
    are those of float64 to 2 % of the largest (2^-8 is bf16's step; fp32: 1e-5)."""
    for (ours, _, inputs), (_, plain, inputs64) in zip(*(the_gradients_written_by_hand(d, dtype) for d in (dtype, torch.float64))):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = ours(*inputs)
        assert y.dtype == (torch.bfloat16 if autocast else dtype)
        weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
        found = torch.autograd.grad((y.double() * weight).sum(), inputs)
        for grad, x, reference in zip(found, inputs, torch.autograd.grad((plain(*inputs64) * weight).sum(), inputs64)):
            assert grad.dtype == x.dtype
            tolerance = 1e-5 if dtype == torch.float32 and not autocast else 0.02
            assert (grad - reference).abs().max() < tolerance * reference.abs().max()


def test_the_same_gradient_every_time_by_two_threads():
    """Determinism: a text that many clips share gets the sum of their gradients in a fixed order, whatever the threads do. Reference: the first of ten."""
    text, threads = nets.ByteText(128, 1, 4, 96), torch.get_num_threads()
    prompts, found = ["", "a red square moving right " * 3, "", ""] * 8, []
    torch.set_num_threads(2)
    try:
        for _ in range(10):
            text.zero_grad()
            features, _ = text(prompts)                                         # 32 x 78 x 128 numbers: x[rows] adds up in any order from 32,768 on
            (features * torch.linspace(-1, 1, features.numel()).view_as(features).sin()).sum().backward()
            found.append(text.embed.weight.grad.clone())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found)


# ---- Shape comments are executed ------------------------------------------------------------------------------------
# The convention. A trailing comment that holds shapes says what its statement leaves behind:
#   # (B, N, D)                    each of the names on the left (or the value returned, item by item)
#   # (B, L, D), (B, L)            the names on the left, one by one
#   # 6 x (B, 1, D), LEVELS of (N h w, 1, h/2^l)    so many items; l is the number of the item
#   # (B, N, D) -> (B, heads, N, D/heads)           argument and value of a lambda
# Words may follow. A dimension is a product of letters (H'W', C p p, 2C, K²), a quotient without remainder, or one|another.
# A letter is one character, perhaps with a prime; longer names are listed here. Per call, a letter is one number.
NAMES = ("c_out", "heads", "D_text", "LEVELS", "ceil")
TOKEN = re.compile(r"\s*(" + "|".join(NAMES) + r"|\d+|[A-Za-z]'?|[-+*/()^²])")


def evaluate(text, letters):
    """The number that a dimension such as `B (T-1)`, `2C`, `H/p`, `ceil(T/t)` stands for."""
    tokens, at = [], 0
    while text[at:].strip():
        match = TOKEN.match(text, at)
        assert match, f"cannot read the dimension {text!r}"
        tokens.append(match[1])
        at = match.end()
    code = ""
    for i, token in enumerate(tokens):
        operand = token[0].isalnum() or token == "("                            # true of ² too
        if i and operand and token != "²" and (tokens[i - 1][0].isalnum() or tokens[i - 1] == ")") and tokens[i - 1] != "ceil":
            code += "*"
        if token.isdecimal():
            code += f"Fraction({token})"
        elif token[0].isalpha():
            assert token == "ceil" or token in letters, f"unknown letter {token!r} in {text!r}"
            code += "ceil" if token == "ceil" else f"L[{token!r}]"
        else:
            code += {"^": "**", "²": "**2"}.get(token, token)
    value = eval(code, {"Fraction": Fraction, "L": {k: Fraction(v) for k, v in letters.items()}, "ceil": lambda x: Fraction(math.ceil(x))})
    assert value.denominator == 1, f"{text!r} is {value}, no whole number"
    return int(value)


def groups(comment):
    """The first run of shapes of a comment: [["B", "N", "D"], ...], what stands before it and what stands after it."""
    found, at, before = [], comment.index("("), comment[:comment.index("(")]
    while True:
        depth, start, dims = 0, at + 1, []
        for at in range(at, len(comment)):
            depth += {"(": 1, ")": -1}.get(comment[at], 0)
            if (comment[at] == "," and depth == 1) or depth == 0:
                dims.append(comment[start:at].strip())
                start = at + 1
            if depth == 0:
                break
        assert depth == 0, f"cannot read {comment!r}"
        found.append([d for d in dims if d])
        rest = comment[at + 1:]
        if not re.match(r", \(", rest):
            return found, before.strip(), rest.strip()
        at += 3


def is_shape_comment(comment):
    """Does the comment hold a parenthesis with a comma and nothing but dimensions in it?"""
    return any("," in inner and all(re.fullmatch(r"(?:%s|[\w']|[-+*/^²| ()])*" % "|".join(NAMES), d) and len(d.replace(" ", "")) <= 12
               for d in inner.split(",")) for inner in re.findall(r"\(((?:[^()]|\([^()]*\))*)\)", comment))


def match_shape(dims, value, letters, where):
    """Compare one tensor with one shape; letters that are new are bound."""
    assert isinstance(value, (torch.Tensor, np.ndarray)), f"{where}: a {type(value).__name__}, expected a tensor or an array {dims}"
    assert len(dims) == value.ndim, f"{where}: found {tuple(value.shape)}, the comment says {dims}"
    for dim, size in zip(dims, value.shape):
        if re.fullmatch(r"[A-Za-z]'?", dim) and dim not in letters:
            letters[dim] = size
        options = [evaluate(d, letters) for d in dim.split("|")]
        assert size in options, f"{where}: found {tuple(value.shape)}, the comment says {dims} with {letters}"


def names_on_the_left(statement, where):
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    names = []
    for target in targets:
        for node in (target.elts if isinstance(target, ast.Tuple) else [target]):
            for leaf in (node.elts if isinstance(node, ast.Tuple) else [node]):
                assert isinstance(leaf, ast.Name), f"{where}: a shape comment on {ast.unparse(target)}"
                names.append(leaf.id)
    return names


def match_comment(comment, values, letters, where):
    """Compare what a statement left behind with its comment."""
    shapes, before, after = groups(comment)
    many = re.fullmatch(r"(\d+) x|(LEVELS) of", before)
    assert many or not before, f"{where}: cannot read {comment!r}"
    assert not re.match(r"\w+ \(", after) and not after.startswith("->"), f"{where}: cannot read {comment!r}"
    if many:
        items = values if len(values) > 1 else list(values[0])
        assert len(items) == int(many[1] or letters["LEVELS"]), f"{where}: {len(items)} items, the comment says {many[0]}"
        assert len(shapes) == 1, f"{where}: cannot read {comment!r}"
        for l, item in enumerate(items):
            own = {**letters, "l": l} if many[2] else letters
            match_shape(shapes[0], item, own, where)
    elif len(shapes) == 1:
        for value in values:
            match_shape(shapes[0], value, letters, where)
    else:
        assert len(shapes) == len(values), f"{where}: {len(values)} values, {len(shapes)} shapes"
        for shape, value in zip(shapes, values):
            match_shape(shape, value, letters, where)


class Watch:
    """Runs code and checks the shape comments of the functions given: {function: letters known beforehand}; `loose`: letters that may
    be another number in every comment. After the run `left` holds the comments that were never reached."""

    def __init__(self, functions, loose="", every_line=()):
        self.known, self.plan, self.loose, self.problems, self.left, self.every = {}, {}, loose, [], set(), set()
        for function, letters in functions.items():
            lines, first = inspect.getsourcelines(function)
            source = textwrap.dedent("".join(lines))
            comments = {t.start[0]: t.string[1:].strip() for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT}
            statements, lambdas = {}, {}
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, (ast.Assign, ast.AugAssign, ast.Return, ast.Expr)):
                    comment = comments.get(node.end_lineno)
                    comment = comment if comment and is_shape_comment(comment) else None
                    if comment and "->" in comment:
                        lambdas[node.lineno + first - 1] = comment
                        comment = "none"
                    for line in range(node.lineno, node.end_lineno + 1):
                        statements[line + first - 1] = (node.lineno + first - 1, node, comment)
            marked = {first - 1 + line for line, comment in comments.items() if is_shape_comment(comment)}
            where = lambda line: f"{function.__code__.co_filename.rsplit('/', 1)[-1]}:{line}"
            lost = marked - set(statements)
            assert not lost, f"shape comments beside no assignment or return: {sorted(map(where, lost))}"
            self.left |= {(where(at), comment) for at, _, comment in statements.values() if comment not in (None, "none")}
            self.left |= {(where(line), comment) for line, comment in lambdas.items()}
            self.plan[function.__code__] = (statements, lambdas, where, letters, function in every_line)

    def __call__(self, frame, event, arg):
        code = frame.f_code
        if code in self.plan:
            statements, lambdas, where, letters, every = self.plan[code]
            return self.follow(statements, where, dict(letters), every)
        if code.co_name == "<lambda>":
            for statements, lambdas, where, letters, _ in self.plan.values():
                line = code.co_firstlineno
                if line in lambdas and where(0).split(":")[0] == code.co_filename.rsplit("/", 1)[-1]:
                    return self.follow_lambda(lambdas[line], where(line), dict(letters), frame.f_locals[code.co_varnames[0]])
        return None

    def check(self, what, *args):
        try:
            match_comment(*args)
        except Exception as error:
            self.problems.append(str(error))
        self.left.discard(what)

    def follow_lambda(self, comment, where, letters, value):
        into, out = (side.strip() for side in comment.split("->"))

        def local(frame, event, arg):
            if event == "return":
                self.check((where, comment), into, [value], letters, where)
                self.check((where, comment), out, [arg], letters, where)
            return local
        return local

    def follow(self, statements, where, letters, every):
        last = None

        def leave(frame, returned):
            if last is None:
                return
            line, node, comment = last
            names = names_on_the_left(node, where(line)) if isinstance(node, (ast.Assign, ast.AugAssign)) and comment not in (None, "none") else []
            if comment is None:
                if every and isinstance(node, ast.Assign):
                    for target in ast.walk(node):
                        if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store) and isinstance(frame.f_locals.get(target.id), torch.Tensor):
                            self.problems.append(f"{where(line)}: {target.id} is a tensor and has no shape comment")
                return
            if comment == "none" or (isinstance(node, ast.Return) and returned is leave):
                return
            if isinstance(node, ast.Return):
                values = list(returned) if isinstance(returned, (tuple, list)) else [returned]
            else:
                values = [frame.f_locals[name] for name in names]
            if all(value is None for value in values):                          # an optional tensor that is not there
                return
            for letter in self.loose:
                letters.pop(letter, None)
            self.check((where(line), comment), comment, values, letters, where(line))

        def local(frame, event, arg):
            nonlocal last
            now = statements.get(frame.f_lineno) if event == "line" else None
            if event == "return":
                leave(frame, arg)
                last = None
            elif event == "line" and (last is None or now is None or now[0] != last[0]):
                leave(frame, leave)
                last = now
            return local
        return local

    def run(self, call):
        before = sys.gettrace()
        sys.settrace(self)
        try:
            return call()
        finally:
            sys.settrace(before)


def shaped(module):
    """Functions and methods of a module that hold shape comments (constructors aside)."""
    owners = [module, *(c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__)]
    found = {}
    for owner in owners:
        for name, f in vars(owner).items():
            f = inspect.unwrap(f) if callable(f) else f
            if inspect.isfunction(f) and f.__module__ == module.__name__ and name != "__init__":
                lines = inspect.getsourcelines(f)[0]
                if any(is_shape_comment(line.split("#", 1)[1]) for line in lines if "#" in line):
                    found[f.__qualname__] = f
    return found


# Functions made for the checker's own test.
def _right(x, p):
    y, z = x.split(1, 1)                                                        # (B, 1, T) each
    w = torch.stack([y, z]).flatten(1, 2).repeat(
        1, 1, p)                                                                # (2, B, p T)
    return w, x                                                                 # (2, B, p T), (B, 2, T)


def _wrong_letter(x, p):
    y = x.transpose(0, 1)                                                       # (B, 2, T)
    return y


def _wrong_product(x, p):
    y = x.repeat(1, 1, p)                                                       # (B, 2, T/p)
    return y


def _inconsistent(x, p):
    y = x[:, :1]                                                                # (B, Q, T)
    z = x                                                                       # (B, Q, T)
    return y, z


def _missing(x, p):
    y = x + 1
    return y                                                                    # (B, 2, T)


def _unreadable(x, p):
    y = x + 1                                                                   # roughly (B, 2, T)
    return y


@pytest.mark.parametrize("function, problem", [(_right, None), (_wrong_letter, "comment says"), (_wrong_product, "no whole number|comment says"),
                                               (_inconsistent, "comment says"), (_missing, "no shape comment"), (_unreadable, "cannot read")])
def test_the_checker_of_shape_comments_can_fail(function, problem):
    """The check below is worth something only if it sees a wrong letter, product, a letter with two values, and what it cannot read."""
    watch = Watch({function: dict(B=3, T=5, p=2)}, every_line=[function])
    watch.run(lambda: function(torch.zeros(3, 2, 5), 2))
    if problem is None:
        assert not watch.problems and not watch.left
    else:
        assert len(watch.problems) == 1 and re.search(problem, watch.problems[0])


def test_shape_comments_of_the_networks():
    """STYLE: shape comments are executed. Every comment of model.py with a shape in it is compared with the real tensors, and every
    tensor assigned in the forwards of the DiT, its block, the text encoder and Conv has one. Reference: sizes typed here, all different."""
    L, names = 9, shaped(nets)
    dit = dict(B=2, C=3, T=5, H=8, W=12, p=2, N=5 * 4 * 6, D=20, L=L, heads=4)
    text = dict(B=2, L=L, D=12, heads=2)
    known = {"Attention.forward": {"B": 2}, "Normed.forward": {"B": 2}, "ByteText.forward": text, "Block.compute": dit, "DiT.forward": dit,
             "DiT.patchify": dit, "DiT.unpatchify": dit}
    tae = {"Conv.forward": {}, "Down.forward": {}, "Up.forward": {}, "TAE.scale": {}, "TAE.moments": {}}
    assert set(names) <= set(known) | set(tae), f"functions with shape comments that nobody runs here: {set(names) - set(known) - set(tae)}"
    every = [names[n] for n in ("DiT.forward", "Block.compute", "ByteText.forward", "Conv.forward")]
    problems, left = [], set()

    def watch(call, **letters):
        w = Watch({names[n]: letters.get(n.replace(".", "_"), known.get(n)) for n in names if n in known or n.replace(".", "_") in letters}, every_line=every)
        w.run(call)
        problems.extend(w.problems)
        return w.left

    torch.manual_seed(0)
    net, encoder = nets.DiT(3, 5, 8, 12, dim=20, depth=2, heads=4, hidden=28, text_dims=[12]), nets.ByteText(12, 1, 2, 16)
    features = watch_text = None
    attention = {"Attention_forward": dict(B=2, D=12, heads=2, L=L)}
    left = watch(lambda: encoder(["12345678", "123"]), **attention)
    features, mask = encoder(["12345678", "123"])
    attention = {"Attention_forward": dict(B=2, D=20, heads=4, L=L)}
    left &= watch(lambda: net(torch.zeros(2, 3, 5, 8, 12), torch.zeros(2), features, mask), **attention)
    net.add_motion()
    left &= watch(lambda: net(torch.zeros(2, 6, 5, 8, 12), torch.zeros(2), features, mask), **attention)
    assert not problems and not left, "\n".join(problems + [f"never reached: {w}: # {c}" for w, c in sorted(left)])

    known.clear()
    for s, t in ((2, 2), (2, 1), (1, 2), (1, 1)):
        size = {"B": 2, "T": 7, "H": 6, "W": 10, "s": s, "t": t, "T'": math.ceil(7 / t), "H'": 6 // s, "W'": 10 // s, "c_out": 8}
        missed = set()
        for r in (1, 2, 3):
            missed |= watch(lambda: nets.Conv(3, 8, s, t)(torch.zeros(2, 3, 7, 6, 10), repeat=r), Conv_forward={**size, "r": r, "T'": math.ceil(7 * r / t)})
        missed |= watch(lambda: nets.Down(16, 16, s, t)(torch.zeros(2, 16, 7, 6, 10)), Down_forward={**size, "c_out": 16})
        missed |= watch(lambda: nets.Up(8, 16, s, t)(torch.zeros(2, 8, 7, 6, 10)), Up_forward={**size, "c_out": 16})
    size = {"B": 2, "C": 4, "T": 7, "T'": 2, "H'": 3, "W'": 4, "D": 16}
    missed |= watch(lambda: small_tae().encode(torch.zeros(2, 3, 7, 12, 16)), TAE_scale=size, TAE_moments=size)
    assert not problems and not missed, "\n".join(problems + [f"never reached: {w}: # {c}" for w, c in sorted(missed)])


def test_shape_comments_of_optical_flow():
    """The same for flow.py: Eq. 5, its inverse, RAFT large and small, whole videos. In RAFT's update block C is any number of channels."""
    names = shaped(flow)
    video = dict(B=2, T=3, H=130, W=141)
    pair = dict(N=1, h=17, w=18, K=9, LEVELS=4, H=130, W=141)
    known = {"flow_to_rgb": video, "rgb_to_flow": video, "estimate_flow": video}
    raft = {"correlation_pyramid": pair, "look_up": pair, "UpdateBlock.forward": pair, "RAFT.forward": pair, "convex_upsample": pair}
    assert set(names) <= set(known) | set(raft), f"functions with shape comments that nobody runs here: {set(names) - set(known) - set(raft)}"
    problems = []

    def watch(known, call):
        w = Watch({names[n]: letters for n, letters in known.items() if n in names}, loose="C")
        w.run(call)
        problems.extend(w.problems)
        return w.left

    d = torch.randn(2, 2, 3, 130, 141)
    left = watch({n: known[n] for n in ("flow_to_rgb", "rgb_to_flow")}, lambda: flow.rgb_to_flow(flow.flow_to_rgb(d)))
    fake = lambda a, b, iters: torch.zeros(len(a), 2, *a.shape[-2:])
    left |= watch({"estimate_flow": video}, lambda: flow.estimate_flow(torch.zeros(2, 3, 3, 130, 141), fake))
    # 17 x 18 cells leave a remainder when halved: the pyramid's quotients are looked at with 16 x 24 cells instead
    even, reached = dict(N=1, h=16, w=24, LEVELS=4, H=128, W=187), None
    for size, K in (("small", 7), ("large", 9)):
        net = flow.RAFT(size).eval().requires_grad_(False)
        missed = watch({n: {**even, "K": K} for n in raft}, lambda: net(torch.zeros(1, 3, 128, 187), torch.zeros(1, 3, 128, 187), iters=1))
        reached = missed if reached is None else reached & missed
    assert not problems and not left | reached, "\n".join(problems + [f"never reached: {w}: # {c}" for w, c in sorted(left | reached)])


def test_shape_comments_of_the_world():
    """The same for the specs and the renderer of data.py: three panning clips of the same number of objects, so that every letter has one value."""
    names = {n: f for n, f in shaped(data).items() if n in ("complete", "_draw", "_background", "_add_noise")}
    words = data.parse("a red square orbiting a blue circle clockwise, camera panning left")
    rng = np.random.default_rng(0)
    letters = dict(B=3, b=3, T=5, H=20, W=24, A=2)
    watch = Watch({f: letters for f in names.values()})
    watch.run(lambda: data.render([data.complete(words, 5, 20, 24, rng, texture=1.0) for _ in range(3)], 5, 20, 24))
    assert not watch.problems and not watch.left, "\n".join(watch.problems + [f"never reached: {w}: # {c}" for w, c in sorted(watch.left)])
