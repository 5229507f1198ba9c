"""model.py: the DiT against numpy in float64, the surgery, masks, first weights, the text encoder,
the TAE against 3-D convolutions, its tiles and shortcuts. No training. About 5 s on one thread.
Sharded nets and checkpointing: test_scale.py.
"""
import math
import re
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import model


def perturb(net, std=0.1):
    """Add noise to every number of a net, so that nothing is zero, one or equal by luck."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p += std * torch.randn(p.shape, generator=draw)
    return net


def fill(net, number):
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(number)
    return net


def fresh_dit(motion=False, depth=2, text_dims=(10,)):
    """C 3, T 2, H 4, W 6, D 24, two heads: 12 tokens."""
    torch.manual_seed(0)
    return model.DiT(3, 2, 4, 6, 24, depth, 2, text_dims, motion=motion)


def small_dit(motion=False, text_dims=(10,)):
    return perturb(fresh_dit(motion, text_dims=text_dims))


def inputs(channels=3):
    """x, t, text, mask of two clips. The first text has 5 tokens, the second 4."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, channels, 2, 4, 6, generator=draw)
    t = torch.rand(2, generator=draw)
    text = torch.randn(2, 5, 10, generator=draw)
    mask = torch.tensor([[True] * 5, [True] * 4 + [False]])
    return x, t, text, mask


# -------------------------------------------------------------------------------------------------
# Sizes

@pytest.mark.parametrize("preset, D, depth, billions", [
    ("4b", 3072, 32, 4.92), ("30b", 6144, 48, 29.3)])
def test_parameters_of_the_papers_models(preset, D, depth, billions):
    """App. C and choice 6: width, depth and head size typed again, 4.92 B and 29.3 B within 1 %.
    Second reference: the large matrices by hand. A block has 8 D^2 in its attentions and 3 D h in
    SwiGLU, with h = 8192 or 16384; the blocks share D^2 + 6 D^2 for the time."""
    config = common.load_config([f"preset={preset}", "run=runs/none"])
    with torch.device("meta"):
        dit = common.build_dit(config, motion=True)
    assert common.latent_size(config) == (16, 16, 32, 32)
    assert (len(dit.blocks), dit.patch, dit.checkpointing) == (depth, 2, True)
    assert dit.blocks[0].attn.heads == D // 128
    hidden = D * 8 // 3
    assert dit.blocks[0].ffn.up.weight.shape == (hidden, D)
    count = sum(p.numel() for p in dit.parameters())
    by_hand = depth * (8 * D * D + 3 * D * hidden) + 7 * D * D
    assert count == pytest.approx(billions * 1e9, rel=0.01)
    assert count == pytest.approx(by_hand, rel=0.01)


# -------------------------------------------------------------------------------------------------
# First weights

def all_nets():
    tae = model.TAE(4, (8, 8, 16), (1, 1), 4, 4)
    return [model.ByteText(12, 2, 2, 16), fresh_dit(motion=True), tae]


def test_init_fills_a_net_that_was_built_without_memory():
    """As large nets are, on the device meta. Reference: a net built plainly, from the same seed;
    NaN stays where init leaves a number out."""
    with torch.device("meta"):
        later = all_nets()
    for net, plain in zip(later, all_nets()):
        net.to_empty(device="cpu")
        fill(net, math.nan)
        for buffer in net.buffers():
            buffer.fill_(math.nan)
        torch.manual_seed(3)
        net.init()
        torch.manual_seed(3)
        plain.init()
        expected = plain.state_dict()
        for name, w in net.state_dict().items():
            assert torch.equal(w, expected[name]), name


def test_matrices_start_with_variance_1_over_fan_in():
    """So a layer keeps the size of what it is given. Reference: the standard deviation of its
    output for normal inputs, within 5 %; away from the edges, which zero padding makes smaller."""
    torch.manual_seed(0)
    ffn = model.SwiGLU(200, 500)
    conv = model.Conv(40, 100)
    model.init_layers(ffn)
    model.init_layers(conv)
    for layer in (ffn.up, ffn.gate, ffn.down):
        y = layer(torch.randn(200, layer.in_features))
        assert y.std().item() == pytest.approx(1, rel=0.05)
    y = conv.space(torch.randn(20, 40, 12, 12))[:, :, 1:-1, 1:-1]
    assert y.std().item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("motion", [False, True])
def test_the_dit_starts_as_zero(motion):
    """Zero-initialised gates and output (App. C): u = 0, for both halves of the joint net too.
    Its zero rows of sec. 4.2 stay zero where init comes after add_motion, as on many GPUs."""
    dit = fresh_dit(motion)
    dit.init()
    assert not dit(*inputs(6 if motion else 3)).any()
    assert not motion or not dit.motion_in.weight.any()


def test_a_fresh_block_is_the_identity():
    """Gates and cross-attention start at zero. Reference: the block's own input, torch.equal; a
    perturbed block is not the identity."""
    dit = fresh_dit(depth=1)
    h = torch.randn(2, 12, 24)
    c = dit.modulation(torch.randn(2, 24)).unflatten(1, (6, -1))
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    arguments = (h, c, torch.randn(2, 5, 24), mask)
    assert torch.equal(dit.blocks[0](*arguments), h)
    assert not torch.allclose(perturb(dit).blocks[0](*arguments), h, atol=1e-3)


# -------------------------------------------------------------------------------------------------
# The surgery, sec. 4.2

@pytest.mark.parametrize("size", [0.0, 1.0, 1e6])
def test_surgery_changes_nothing_to_the_last_bit(size):
    """Sec. 4.2: after add_motion the net is the base, for any d, and predicts no motion yet.
    Reference: the same net before, all its weights perturbed; torch.equal."""
    dit = small_dit()
    x, t, text, mask = inputs()
    before = dit(x, t, text, mask)
    weights = {name: w.clone() for name, w in dit.state_dict().items()}
    assert before.abs().min() > 0
    dit.add_motion()
    d = size * torch.randn(x.shape)
    after = dit(torch.cat([x, d], dim=1), t, text, mask)
    assert torch.equal(after[:, :3], before)
    assert not after[:, 3:].any()
    for name, w in weights.items():
        assert torch.equal(dit.state_dict()[name], w), name


def test_the_widened_matrices_are_the_papers():
    """Sec. 4.2: [x, d] W_in+ with one matrix of 2 C p p rows, and W_out+ with twice the columns.
    Reference: a base DiT for 2C channels whose W_in and W_out are put together from the parts.
    All weights have a gradient."""
    joint = small_dit(motion=True)
    torch.manual_seed(0)
    wide = model.DiT(6, 2, 4, 6, 24, 2, 2, [10])
    weights = joint.state_dict()
    for layer, dim in (("in", 1), ("out", 0)):
        parts = [weights[f"patch_{layer}.weight"], weights.pop(f"motion_{layer}.weight")]
        weights[f"patch_{layer}.weight"] = torch.cat(parts, dim)
    wide.load_state_dict(weights)
    u = joint(*inputs(6))
    torch.testing.assert_close(u, wide(*inputs(6)), rtol=1e-5, atol=1e-5)
    u.square().mean().backward()
    for name, p in joint.named_parameters():
        assert p.grad.any(), name


# -------------------------------------------------------------------------------------------------
# DiT, Eq. 4

def silu(a):
    return a / (1 + np.exp(-a))


def rms_norm(a, weight):
    return a / np.sqrt((a * a).mean(-1, keepdims=True) + 1e-6) * weight


def heads(y, matrix):
    return (y @ matrix.T).reshape(len(y), -1, 2, len(matrix) // 2)      # two heads


def attention(a, b, w, name, look):
    q = heads(a, w[f"{name}.q.weight"])
    k = heads(b, w[f"{name}.k.weight"])
    v = heads(b, w[f"{name}.v.weight"])
    score = np.einsum("bnhe,blhe->bhnl", q, k) / math.sqrt(q.shape[-1])
    p = np.exp(score) * look[:, None, None]
    out = np.einsum("bhnl,blhe->bnhe", p / p.sum(-1, keepdims=True), v)
    return out.reshape(a.shape) @ w[f"{name}.out.weight"].T


def numpy_block(h, c, y, w, b, mask):
    scale1, shift1, gate1, scale2, shift2, gate2 = np.moveaxis(c + w[b + "table"], 1, 0)[:, :, None]
    own = rms_norm(h, w[b + "norm1.weight"]) * (1 + scale1) + shift1
    h = h + gate1 * attention(own, own, w, b + "attn", np.ones(h.shape[:2], bool))
    h = h + attention(rms_norm(h, w[b + "norm2.weight"]), y, w, b + "cross", mask)
    own = rms_norm(h, w[b + "norm3.weight"]) * (1 + scale2) + shift2
    inner = silu(own @ w[b + "ffn.gate.weight"].T) * (own @ w[b + "ffn.up.weight"].T)
    return h + gate2 * (inner @ w[b + "ffn.down.weight"].T)


def numpy_dit(dit, x, t, text, mask):
    """Eq. 4 and App. C in float64. Patches are cut out one by one."""
    w = {name: p.detach().double().numpy() for name, p in dit.named_parameters()}
    x = x.double().numpy()
    t = t.double().numpy()
    f = text.double().numpy() @ w["text_in.0.weight"].T
    f = (f - f.mean(-1, keepdims=True)) / np.sqrt(f.var(-1, keepdims=True) + 1e-5)
    y = f * w["text_norm.0.weight"]
    angle = 1000 * t[:, None] * 10000.0 ** (-np.arange(128) / 128)
    e = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    e = silu(silu(e @ w["time.0.weight"].T) @ w["time.2.weight"].T)
    c = (e @ w["modulation.weight"].T).reshape(len(x), 6, -1)

    places = [(i, j, k) for i in range(2) for j in range(2) for k in range(3)]
    tokens, positions = [], []
    for i, j, k in places:
        patch = x[:, :, i, 2 * j:2 * j + 2, 2 * k:2 * k + 2].reshape(len(x), -1)
        tokens.append(patch @ w["patch_in.weight"].T)
        positions.append(w["pos_t"][i, 0, 0] + w["pos_h"][0, j, 0] + w["pos_w"][0, 0, k])
    h = np.stack(tokens, axis=1)
    for b in ("blocks.0.", "blocks.1."):
        h = numpy_block(h + np.stack(positions), c, y, w, b, mask.numpy())
    scale, shift = np.moveaxis(e[:, None] + w["table"], 1, 0)[:, :, None]
    u = (rms_norm(h, w["norm.weight"]) * (1 + scale) + shift) @ w["patch_out.weight"].T
    out = np.zeros_like(x)
    for n, (i, j, k) in enumerate(places):
        patch = u[:, n].reshape(len(x), 3, 2, 2)
        out[:, :, i, 2 * j:2 * j + 2, 2 * k:2 * k + 2] = patch
    return torch.from_numpy(out)


def test_the_dit_is_equation_4():
    """W_in, positions before each block, self-attention, cross-attention under the mask, SwiGLU,
    the shared modulation, W_out. Reference: numpy in float64, patch by patch. 1e-4: float32 sines
    of angles up to 1000."""
    dit = small_dit()
    u = dit(*inputs()).double()
    torch.testing.assert_close(u, numpy_dit(dit, *inputs()), rtol=1e-4, atol=1e-4)


def test_padding_of_the_text_does_not_show():
    """Masked tokens are invisible. Reference: u without them, while garbage 1,000 times larger
    stands behind the mask (1e-5: order of summation), and their gradient, exactly zero."""
    dit = small_dit()
    x, t, text, mask = inputs()
    garbage = torch.cat([text, 1000 * torch.randn(2, 4, 10)], dim=1).requires_grad_()
    padded = dit(x, t, garbage, F.pad(mask, (0, 4)))
    torch.testing.assert_close(padded, dit(x, t, text, mask), rtol=1e-5, atol=1e-5)
    influence = torch.autograd.grad(padded.square().sum(), garbage)[0].abs().sum(dim=-1)
    assert torch.equal(influence > 0, F.pad(mask, (0, 4)))


def test_only_the_positions_know_the_place():
    """Attention has no order: with the positions of an axis at zero, a shift of x by whole patches
    along it shifts u alike; with them it does not. Reference: that symmetry."""
    dit = small_dit()
    x, t, text, mask = inputs()
    for axis, step, position in ((2, 1, dit.pos_t), (3, 2, dit.pos_h), (4, 2, dit.pos_w)):
        gaps = []
        for _ in range(2):
            moved = dit(x.roll(step, axis), t, text, mask)
            gap = moved - dit(x, t, text, mask).roll(step, axis)
            gaps.append(gap.abs().max().item())
            torch.nn.init.zeros_(position)
        assert gaps[0] > 1e-2
        assert gaps[1] < 1e-4


def test_several_text_encoders_stand_side_by_side():
    """App. C: each encoder is projected by itself, and all are seen. Reference: the DiT of the
    first alone, with the same weights, where the masks of the others are False."""
    three = small_dit(text_dims=(10, 7, 5))
    one = fresh_dit()
    one.load_state_dict({name: three.state_dict()[name] for name in one.state_dict()})
    x, t, text, mask = inputs()
    texts = [text, torch.randn(2, 6, 7), torch.randn(2, 3, 5)]
    unseen = torch.zeros(2, 6, dtype=torch.bool)
    alone = one(x, t, text, mask)
    together = three(x, t, texts, [mask, unseen, unseen[:, :3]])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    for masks in ([mask, ~unseen, unseen[:, :3]], [mask, unseen, ~unseen[:, :3]]):
        assert not torch.allclose(three(x, t, texts, masks), alone, atol=1e-3)


@pytest.mark.parametrize("motion, shape", [
    (False, (1, 6, 2, 4, 6)), (True, (1, 3, 2, 4, 6)), (False, (1, 3, 2, 6, 4))])
def test_the_dit_refuses_another_size(motion, shape):
    """And says what was found and what was expected."""
    expected = (6 if motion else 3, 2, 4, 6)
    message = f"found a latent of shape {shape[1:]}, expected {expected}"
    with pytest.raises(ValueError, match=re.escape(message)):
        small_dit(motion)(torch.zeros(shape), *inputs()[1:])


def test_the_sum_over_the_blocks_stays_in_fp32():
    """Under autocast products are bf16, but what the blocks add up is not; nor is it where the
    weights are bf16, as under FSDP; and no norm warns of two dtypes. Reference: the dtypes that
    the blocks see, and fp32's u: 2 % are five steps of bf16."""
    dit = small_dit()
    u = dit(*inputs())
    for block in dit.blocks:
        block.register_forward_hook(lambda block, x, h: dtypes.extend([x[0].dtype, h.dtype]))
    for net in (dit, dit.bfloat16()):
        dtypes = []
        with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
            warnings.simplefilter("error")
            rounded = net(*inputs())
            model.ByteText(8, 1, 2, 16).bfloat16()(["a"])
        assert dtypes == [torch.float32] * 4
        assert (rounded - u).abs().max() < 0.02 * u.abs().max()


# -------------------------------------------------------------------------------------------------
# Text

def test_byte_ids_are_byt5s():
    """Byte + 3, padding 0, end 1. Reference: 'a' is 97, e acute is the bytes 195 and 169, and the
    empty prompt is the end token alone. The batch is padded to its longest prompt."""
    text = model.ByteText(8, 1, 2, 16)
    prompts = ["a", "é!", ""]
    assert text.tokenize(prompts).tolist() == [[100, 1, 0, 0], [198, 172, 36, 1], [1, 0, 0, 0]]
    assert text.tokenize([""]).tolist() == [[1]]
    features, mask = text(prompts)
    assert torch.equal(mask, text.tokenize(prompts) > 0)
    size = features.square().mean(dim=-1)       # a norm comes last
    torch.testing.assert_close(size, torch.ones(3, 4), rtol=1e-4, atol=1e-4)


def test_a_long_prompt_is_cut_with_a_warning():
    """A text of length 8 has room for 7 bytes and the end: the eighth byte is cut, and said."""
    text = model.ByteText(8, 1, 2, 8)
    whole = [[100, 101, 102, 103, 104, 105, 106, 1]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert text.tokenize(["abcdefg"]).tolist() == whole
    for prompt in ("abcdefgh", "abcdefghijklmnop"):
        with pytest.warns(UserWarning, match="cut to 7 bytes"):
            assert text.tokenize([prompt]).tolist() == whole


def test_features_of_a_prompt_do_not_depend_on_the_batch():
    """Padding is masked in the text encoder too. Reference: the prompt alone (1e-5: order of
    summation). A later byte changes the first feature, and equal bytes differ by their place."""
    text = perturb(model.ByteText(12, 2, 2, 32))
    alone = text(["red"])[0]
    together = text(["red", "a much longer prompt"])[0]
    torch.testing.assert_close(together[:1, :4], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(text(["ren"])[0][:, 0], alone[:, 0], atol=1e-3)
    assert not torch.allclose(text(["aaa"])[0][0, 0], text(["aaa"])[0][0, 1], atol=1e-2)


def test_the_same_gradient_every_time_by_two_threads():
    """Many prompts share a byte; its gradient is summed in a fixed order, whatever the threads do.
    Reference: the first of four, torch.equal."""
    text = model.ByteText(128, 1, 4, 96)
    prompts = ["", "a red square moving right " * 3] * 8
    found = []
    torch.set_num_threads(2)
    try:
        for _ in range(4):
            features = text(prompts)[0]
            weight = torch.arange(features.numel()).sin().view_as(features)
            found += torch.autograd.grad((features * weight).sum(), text.embed)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(found[0], other) for other in found)


# -------------------------------------------------------------------------------------------------
# TAE

def small_tae(spatial=4, temporal=4, tile=32):
    torch.manual_seed(0)
    levels = int(math.log2(max(spatial, temporal)))
    tae = model.TAE(4, (8, 8, 16, 16)[:levels + 1], (1, 0, 1)[:levels], spatial, temporal, tile)
    return perturb(tae, 0.05).requires_grad_(False)


def random_video(T, H=16, W=16, B=1):
    return torch.rand(B, 3, T, H, W, generator=torch.Generator().manual_seed(4)) * 2 - 1


@pytest.mark.parametrize("T", [1, 7, 8, 9, 17])
@pytest.mark.parametrize("spatial, temporal", [(4, 4), (8, 8), (8, 4), (2, 4)])
def test_any_number_of_frames(spatial, temporal, T):
    """App. C: T frames give ceil(T / temporal) latents and come back as T frames."""
    tae = small_tae(spatial, temporal)
    video = random_video(T, 16, 24, B=2)
    z = tae.encode(video)
    assert z.shape == (2, 4, math.ceil(T / temporal), 16 // spatial, 24 // spatial)
    assert tae.decode(z, T).shape == video.shape


@pytest.mark.parametrize("words, message", [
    (dict(spatial=3), "expected some of [1, 2, 4]"),
    (dict(temporal=8), "expected some of [1, 2, 4]"),
    (dict(channels=5), "a last width of 16 and 5 latent channels, expected a multiple"),
    (dict(widths=(8, 24, 48)), "widths 8, 24, expected the second to divide 64")])
def test_the_tae_refuses_sizes_that_do_not_fit(words, message):
    """Two halvings give 1, 2, 4; a latent channel is the mean of whole groups; 8 x 2 x 2 x 2 = 64
    numbers of a cell go into 16 channels but not into 24. Reference: those remainders."""
    good = dict(channels=4, widths=(8, 16, 16), blocks=(0, 0), spatial=4, temporal=4)
    model.TAE(**good)
    with pytest.raises(ValueError, match=re.escape(message)):
        model.TAE(**{**good, **words})


def convolutions(conv, x, s=1, t=1):
    """Conv by two 3-D convolutions in float64, one frame deep and one pixel wide."""
    space, time = conv.double().space, conv.time
    y = F.conv3d(x, space.weight[:, :, None], space.bias, (1, s, s), (0, 1, 1))
    y = F.pad(y, (0, 0, 0, 0, 1, 1), mode="replicate")
    return F.conv3d(y, time.weight[..., None], time.bias, (t, 1, 1))


@pytest.mark.parametrize("s, t, T", [(1, 1, 5), (2, 1, 1), (1, 2, 6), (2, 2, 5)])
def test_a_pair_of_convolutions(s, t, T):
    """Movie Gen: a 2-D convolution, then a 1-D one over time, not causal: both ends are replicated.
    Reference: 3-D convolutions; those of a ResBlock too, around SiLU and the identity."""
    x = torch.randn(2, 2, T, 6, 8)
    conv = perturb(model.Conv(2, 3, s, t))
    y = conv(x).double()
    torch.testing.assert_close(y, convolutions(conv, x.double(), s, t), rtol=1e-5, atol=1e-5)
    block = perturb(model.ResBlock(2))
    y = block(x).double()
    inner = convolutions(block.conv1, F.silu(x.double()))
    expected = x + convolutions(block.conv2, F.silu(inner))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_it_starts_as_an_image_autoencoder():
    """Temporal convolutions start as the identity: a still clip has the latents of its picture, and
    each decodes to the same four frames. Reference: the picture, as a clip of one frame. Residual
    branches start at zero. The log-variance starts at -6, and stays in its bounds."""
    torch.manual_seed(0)
    tae = model.TAE(4, (8, 8, 16), (1, 1), 4, 4)
    one = tae.encode(random_video(1))
    z = tae.encode(random_video(1).expand(-1, -1, 12, -1, -1))
    torch.testing.assert_close(z, one.expand(-1, -1, 3, -1, -1), rtol=1e-5, atol=1e-5)
    video = tae.decode(z, 12)
    still = video[:, :, :4].repeat(1, 1, 3, 1, 1)
    torch.testing.assert_close(video, still, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(video[:, :, :1], tae.decode(one, 1), rtol=1e-5, atol=1e-5)
    x = torch.randn(1, 16, 3, 4, 4)
    assert torch.equal(tae.encoder[-3:](x), x)
    assert (tae.moments(torch.zeros(1, 3, 4, 8, 8))[1] == -6).all()
    logvar = tae.moments(1e6 * random_video(4))[1]
    assert (logvar.min(), logvar.max()) == (-30, 20)


@pytest.mark.parametrize("off, where", [("time", (1,)), ("space", (slice(None), 2, 3))])
def test_attention_in_space_and_over_time(off, where):
    """Attention inside a frame and then over time at a place. Reference: with the other one at
    zero, who notices that the number at frame 1, row 2, column 3 changes."""
    net = perturb(model.PixelAttention(8))
    fill(getattr(net, off), 0)
    x = torch.randn(1, 8, 3, 4, 5)
    other = x.clone()
    other[:, 0, 1, 2, 3] += 1
    noticed = (net(x) - net(other)).abs().amax(dim=(0, 1)) > 1e-6
    expected = torch.zeros(3, 4, 5, dtype=torch.bool)
    expected[where] = True
    assert torch.equal(noticed, expected)


@pytest.mark.parametrize("s, t, T", [(2, 2, 6), (2, 2, 5), (2, 1, 3), (1, 2, 5)])
def test_shortcuts_copy_cells_to_channels_and_back(s, t, T):
    """Down puts each t x s x s cell into the channels, Up puts it back. Reference: the input, as
    the convolutions are zero and there is room for every number; an odd clip repeats its last
    frame. Where there is no room, the mean over the channels is that over the cells."""
    down = fill(model.Down(2, 2 * t * s * s, s, t), 0)
    up = fill(model.Up(2 * t * s * s, 2, s, t), 0)
    x = torch.randn(2, 2, T, 4, 6)
    padded = torch.cat([x] + [x[:, :, -1:]] * (T % t), dim=2)
    assert torch.equal(up(down(x)), padded)
    narrow = fill(model.Down(2, 2, s, t), 0)(x)
    cells = F.avg_pool3d(padded, (t, s, s)).mean(dim=1)
    torch.testing.assert_close(narrow.mean(dim=1), cells, rtol=1e-5, atol=1e-6)
    copies = fill(model.Up(2, 2, s, t), 0)(x).mean(dim=1, keepdim=True)
    pooled = F.avg_pool3d(copies, (t, s, s))
    torch.testing.assert_close(pooled, x.mean(dim=1, keepdim=True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("s, t", [(2, 2), (2, 1), (1, 2)])
def test_up_convolves_the_nearest_neighbours(s, t):
    """Reference: pixels copied by indexing, and the pair of convolutions; the shortcut alone."""
    up = perturb(model.Up(8, 4, s, t))
    x = torch.randn(2, 8, 3, 4, 6)
    frames, rows, columns = (torch.arange(n * r) // r for n, r in ((3, t), (4, s), (6, s)))
    copies = x[:, :, frames][:, :, :, rows][..., columns]
    shortcut = fill(model.Up(8, 4, s, t), 0)(x)
    torch.testing.assert_close(up(x), up.conv(copies) + shortcut, rtol=1e-5, atol=1e-5)


def test_shortcuts_around_the_latent():
    """A latent channel is a group's mean plus a convolution, and is copied back to its group.
    Reference: reshapes of what encoder and decoder see, with those convolutions at zero."""
    tae = small_tae()
    fill(tae.to_latent, 0)
    fill(tae.from_latent, 0)
    seen = []
    tae.encoder.register_forward_hook(lambda net, x, h: seen.append(h))
    tae.decoder.register_forward_pre_hook(lambda net, x: seen.append(x[0]))
    mean, logvar = tae.moments(random_video(8))
    tae.reconstruct(mean)
    for channel in range(4):
        group = slice(4 * channel, 4 * channel + 4)
        torch.testing.assert_close(mean[:, channel], seen[0][:, group].mean(dim=1))
        assert (seen[1][:, group] == mean[:, [channel]]).all()


def test_statistics_bring_either_stream_to_its_own_scale():
    """Choice 3: encode subtracts the stream's mean and divides by its standard deviation, decode
    undoes it. Reference: `moments` by hand; fresh statistics are 0 and 1."""
    tae = small_tae()
    video = random_video(8)
    plain = tae.moments(video)[0]
    assert torch.equal(tae.encode(video, motion=True), plain)
    again = tae.reconstruct(plain)
    tae.statistics.copy_(torch.arange(1.0, 17).view(2, 2, 4))
    for motion, first in ((False, 1), (True, 9)):
        mean = torch.arange(first, first + 4).view(4, 1, 1, 1)
        z = tae.encode(video, motion)
        torch.testing.assert_close(z * (mean + 4) + mean, plain, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(tae.decode(z, 8, motion), again, rtol=1e-3, atol=1e-3)


def test_long_clips_need_constant_memory():
    """App. C: no convolution is given more than `tile` frames. Reference: all their inputs."""
    tae = small_tae(tile=8)
    seen = []
    for module in tae.modules():
        if isinstance(module, model.Conv):
            module.register_forward_pre_hook(lambda module, x: seen.append(x[0].shape[2]))
    assert tae.decode(tae.encode(random_video(61, 8, 8)), 61).shape[2] == 61
    assert max(seen) == 8


@pytest.mark.parametrize("T", [8, 9, 12, 13, 16, 17, 31, 40])
def test_tiles_are_blended_linearly(T):
    """Tiles of 32 frames begin every 16. Reference: a decoder whose n-th tile is the number n.
    Over the 16 frames that two tiles share, the number rises evenly by 1."""
    calls = []

    def numbered(z):
        calls.append(z.shape[2])
        return torch.full((1, 3, 4 * z.shape[2], 1, 1), len(calls) - 1.0)

    tae = small_tae()
    tae.reconstruct = numbered
    found = tae.decode(torch.zeros(1, 4, T, 1, 1), 4 * T)[0, 0, :, 0, 0].tolist()
    last = math.ceil((T - 8) / 4)
    expected = []
    for frame in range(4 * T):
        number = frame // 16 - 1 + frame % 16 / 15
        expected.append(min(max(number, 0), last))
    assert max(calls) == 8
    assert found == pytest.approx(expected, abs=1e-5)


def test_tiles_agree_with_the_whole_clip():
    """Reference: the same net with one tile. Far from the ends of its tiles, further than the
    convolutions see (8 at the lowest resolution and 3 above: 9 latents), nothing differs. The
    attention over time, which sees a whole tile, is left at zero, as in a fresh net."""
    torch.manual_seed(0)
    tae = model.TAE(4, (8, 8, 16), (0, 0), 4, 4, tile=320)
    for module in tae.modules():
        if isinstance(module, model.Conv):
            perturb(module)
    tae.requires_grad_(False)
    video = random_video(320, 8, 8)
    whole = tae.encode(video)
    decoded = tae.decode(whole, 320)
    tae.tile = 160
    gap = (tae.encode(video) - whole).abs().amax(dim=(0, 1, 3, 4)) / whole.abs().max()
    assert gap[:31].max() < 1e-5 and gap[49:].max() < 1e-5      # the tiles meet at latent 40
    assert gap[38:42].max() > 1e-4
    gap = (tae.decode(whole, 320) - decoded).abs().amax(dim=(0, 1, 3, 4)) / decoded.abs().max()
    gap = gap.view(80, 4).amax(dim=1)                           # tiles begin at latents 0, 20, 40
    assert max(gap[:20].max(), gap[29:31].max(), gap[49:51].max(), gap[60:].max()) < 1e-5
    assert gap.max() > 1e-4
