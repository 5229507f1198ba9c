"""model.py: the DiT against Eq. 4 in float64, the surgery, masks, first weights, text, the TAE and
its tiles. About 3 s on one thread. Sharded nets and checkpointing: test_scale.py.
"""
import itertools
import math
import re
import warnings

import pytest
import torch
import torch.nn.functional as F

import common
import model


def close(found, expected, gap=1e-5):
    """1e-5: the order of summation in float32."""
    torch.testing.assert_close(found, expected, rtol=gap, atol=gap)


def perturb(net, std=0.1):
    """Add noise to every number of a net, so that nothing is zero, one or equal by luck."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p += std * torch.randn(p.shape, generator=draw)
    return net


def zeroed(net):
    for p in net.parameters():
        torch.nn.init.zeros_(p)
    return net


def fresh_dit(motion=False, channels=3, text_dims=(10,)):
    """T 2, H 4, W 6, D 24, two blocks with two heads: 12 tokens."""
    torch.manual_seed(0)
    return model.DiT(channels, 2, 4, 6, 24, 2, 2, text_dims, motion=motion)


def inputs(channels=3):
    """x, t, text, mask of two clips. The first text has 5 tokens, the second 4."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, channels, 2, 4, 6, generator=draw)
    t = torch.rand(2, generator=draw)
    text = torch.randn(2, 5, 10, generator=draw)
    mask = torch.tensor([[True] * 5, [True] * 4 + [False]])
    return x, t, text, mask


# -------------------------------------------------------------------------------------------------
# Sizes and first weights

@pytest.mark.parametrize("preset, D, depth, billions", [
    ("4b", 3072, 32, 4.92), ("30b", 6144, 48, 29.3)])
def test_parameters_of_the_papers_models(preset, D, depth, billions):
    """App. C and choice 6: width, depth and head size typed again, 4.92 B and 29.3 B within 1 %.
    128 frames of 256 x 256 px are 16 x 32 x 32 latents, in patches of 1 x 2 x 2."""
    config = common.load_config([f"preset={preset}", "run=runs/none"])
    with torch.device("meta"):
        dit = common.build_dit(config, motion=True)
    assert common.latent_size(config) == (16, 16, 32, 32)
    assert (len(dit.blocks), dit.patch, dit.checkpointing) == (depth, 2, True)
    assert dit.blocks[0].attn.heads == D // 128
    assert dit.blocks[0].ffn.up.weight.shape == (D * 8 // 3, D)
    count = sum(p.numel() for p in dit.parameters())
    assert count == pytest.approx(billions * 1e9, rel=0.01)


def test_init_fills_a_net_that_was_built_without_memory():
    """As large nets are, on the device meta. Reference: a net built plainly, from the same seed;
    NaN stays where init leaves a number out."""
    def nets():
        tae = model.TAE(4, (8, 8, 16), (1, 1), 4, 4)
        return [model.ByteText(12, 2, 2, 16), fresh_dit(motion=True), tae]

    with torch.device("meta"):
        later = nets()
    for net, plain in zip(later, nets()):
        net.to_empty(device="cpu")
        for w in net.state_dict().values():
            w.fill_(math.nan)
        for each in (net, plain):
            torch.manual_seed(3)
            each.init()
        for w, expected in zip(net.state_dict().values(), plain.state_dict().values()):
            assert torch.equal(w, expected)


def test_matrices_start_with_variance_1_over_fan_in():
    """So a layer keeps the size of what it is given. Reference: the standard deviation of weights,
    5 % from 10,000 numbers or more. A kernel's fan-in is its channels times 3 x 3."""
    net = torch.nn.Sequential(torch.nn.Linear(50, 200), torch.nn.Conv2d(40, 50, 3))
    model.init_layers(net)
    for layer, fan_in in zip(net, (50, 360)):
        assert layer.weight.std().item() == pytest.approx(fan_in ** -0.5, rel=0.05)


@pytest.mark.parametrize("motion", [False, True])
def test_the_dit_starts_as_zero_and_its_blocks_as_the_identity(motion):
    """Zero-initialised gates and output (App. C): u = 0, for both halves of the joint net too.
    The zero rows of sec. 4.2 stay zero where init comes after add_motion, as on many GPUs."""
    dit = fresh_dit(motion)
    dit.init()
    seen = []
    for block in dit.blocks:
        block.register_forward_hook(lambda block, x, h: seen.append((x[0], h)))
    assert not dit(*inputs(6 if motion else 3)).any()
    assert len(seen) == 2
    for before, after in seen:
        assert before.any() and torch.equal(before, after)
    assert not motion or not dit.motion_in.weight.any()


# -------------------------------------------------------------------------------------------------
# The surgery, sec. 4.2

@pytest.mark.parametrize("size", [0.0, 1.0, 1e6])
def test_surgery_changes_nothing_to_the_last_bit(size):
    """Sec. 4.2: after add_motion the net is the base, for any d, and predicts no motion yet.
    Reference: the same net before, all its weights perturbed; torch.equal."""
    dit = perturb(fresh_dit())
    x, t, text, mask = inputs()
    before = dit(x, t, text, mask)
    dit.add_motion()
    d = size * torch.randn(x.shape)
    after = dit(torch.cat([x, d], dim=1), t, text, mask)
    assert torch.equal(after[:, :3], before)
    assert not after[:, 3:].any()


def test_the_widened_matrices_are_the_papers():
    """Sec. 4.2: [x, d] W_in+ with one matrix of 2 C p p rows, and W_out+ with twice the columns.
    Reference: a base DiT for 2C channels whose W_in and W_out are put together from the parts.
    All weights have a gradient."""
    joint = perturb(fresh_dit(motion=True))
    wide = fresh_dit(channels=6)
    weights = joint.state_dict()
    for layer, dim in (("in", 1), ("out", 0)):
        parts = [weights[f"patch_{layer}.weight"], weights.pop(f"motion_{layer}.weight")]
        weights[f"patch_{layer}.weight"] = torch.cat(parts, dim)
    wide.load_state_dict(weights)
    u = joint(*inputs(6))
    close(u, wide(*inputs(6)))
    u.square().mean().backward()
    for name, p in joint.named_parameters():
        assert p.grad.any(), name


# -------------------------------------------------------------------------------------------------
# DiT, Eq. 4

def attention(a, b, w, name, mask):
    """torch's own module. a (B, N, D), b (B, L, D), mask (B, L)"""
    net = torch.nn.MultiheadAttention(24, num_heads=2, bias=False, batch_first=True)
    net.in_proj_weight.data = torch.cat([w[f"{name}.{part}.weight"] for part in "qkv"])
    net.out_proj.weight.data = w[f"{name}.out.weight"]
    return net(a, b, b, key_padding_mask=~mask)[0]


def rms_norm(a, weight):
    return a / (a.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def block_by_hand(h, c, y, w, b, mask):
    scale1, shift1, gate1, scale2, shift2, gate2 = (c + w[b + "table"])[:, :, None].unbind(1)
    own = rms_norm(h, w[b + "norm1.weight"]) * (1 + scale1) + shift1
    h = h + gate1 * attention(own, own, w, b + "attn", torch.ones(2, 12, dtype=torch.bool))
    h = h + attention(rms_norm(h, w[b + "norm2.weight"]), y, w, b + "cross", mask)
    own = rms_norm(h, w[b + "norm3.weight"]) * (1 + scale2) + shift2
    inner = F.silu(own @ w[b + "ffn.gate.weight"].T) * (own @ w[b + "ffn.up.weight"].T)
    return h + gate2 * (inner @ w[b + "ffn.down.weight"].T)


def dit_by_hand(dit, x, t, text, mask):
    """Eq. 4 and App. C in float64."""
    w = {name: p.detach().double() for name, p in dit.named_parameters()}
    y = F.layer_norm(text.double() @ w["text_in.0.weight"].T, (24,), w["text_norm.0.weight"])
    angle = 1000 * t.double()[:, None] * 10000 ** (-torch.arange(128).double() / 128)
    e = torch.cat([angle.cos(), angle.sin()], dim=1)
    e = F.silu(F.silu(e @ w["time.0.weight"].T) @ w["time.2.weight"].T)
    c = (e @ w["modulation.weight"].T).view(2, 6, 24)

    patches = x.double().view(2, 3, 2, 2, 2, 3, 2)          # (B, C, T, H/p, p, W/p, p)
    patches = patches.permute(0, 2, 3, 5, 1, 4, 6)          # (B, T, H/p, W/p, C, p, p)
    h = patches.reshape(2, 12, 12) @ w["patch_in.weight"].T
    position = torch.stack([
        w["pos_t"][i, 0, 0] + w["pos_h"][0, j, 0] + w["pos_w"][0, 0, k]
        for i, j, k in itertools.product(range(2), range(2), range(3))])
    for b in ("blocks.0.", "blocks.1."):
        h = block_by_hand(h + position, c, y, w, b, mask)
    scale, shift = (e[:, None] + w["table"])[:, :, None].unbind(1)
    u = (rms_norm(h, w["norm.weight"]) * (1 + scale) + shift) @ w["patch_out.weight"].T
    return u.view(2, 2, 2, 3, 3, 2, 2).permute(0, 4, 1, 2, 5, 3, 6).reshape(x.shape)


def test_the_dit_is_equation_4():
    """W_in, positions before each block, self-attention, cross-attention under the mask, SwiGLU,
    the shared modulation, W_out. Reference: plain products and torch's own attention, in float64.
    1e-4: float32 sines of angles up to 1000."""
    dit = perturb(fresh_dit())
    close(dit(*inputs()).double(), dit_by_hand(dit, *inputs()), 1e-4)


def test_what_the_mask_hides_does_not_show():
    """App. C: text encoders stand side by side, each projected by itself; masked tokens count
    nothing. Reference: the DiT of the first encoder alone, without the garbage 1,000 times larger
    that now stands behind the mask."""
    both = perturb(fresh_dit(text_dims=(10, 7)))
    one = fresh_dit()
    one.load_state_dict({name: both.state_dict()[name] for name in one.state_dict()})
    x, t, text, mask = inputs()
    alone = one(x, t, text, mask)
    texts = [torch.cat([text, 1000 * torch.randn(2, 4, 10)], dim=1), torch.randn(2, 6, 7)]
    mask = F.pad(mask, (0, 4))
    seen = torch.ones(2, 6, dtype=torch.bool)
    close(both(x, t, texts, [mask, ~seen]), alone)
    assert not torch.allclose(both(x, t, texts, [mask, seen]), alone, atol=1e-3)


def test_the_dit_refuses_another_size():
    """And says what was found and what was expected: twice as many channels, with motion."""
    message = "found a latent of shape (3, 2, 4, 6), expected (6, 2, 4, 6)"
    with pytest.raises(ValueError, match=re.escape(message)):
        fresh_dit(motion=True)(*inputs())


def test_the_sum_over_the_blocks_stays_in_fp32():
    """Under autocast products are bf16, but what the blocks add up is not; nor is it where the
    weights are bf16, as under FSDP; and no norm warns of two dtypes. Reference: the dtypes that
    the blocks see, and fp32's u: 2 % are five steps of bf16."""
    dit = perturb(fresh_dit())
    u = dit(*inputs())

    def note(block, x, h):
        dtypes.extend([x[0].dtype, h.dtype])

    for block in dit.blocks:
        block.register_forward_hook(note)
    for net in (dit, dit.bfloat16()):
        dtypes = []
        with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
            warnings.simplefilter("error")
            rounded = net(*inputs())
            text = model.ByteText(8, 1, 2, 16).bfloat16()
            text.blocks[0].register_forward_hook(note)
            text(["a"])
        assert dtypes == [torch.float32] * 6
        assert (rounded - u).abs().max() < 0.02 * u.abs().max()


# -------------------------------------------------------------------------------------------------
# Text

def test_byte_ids_are_byt5s():
    """Byte + 3, padding 0, end 1. Reference: 'a' is 97, e acute is the bytes 195 and 169, and the
    empty prompt is the end token alone. A length of 4 has room for 3 bytes: the next is cut."""
    text = model.ByteText(8, 1, 2, length=4)
    ids = [[100, 1, 0, 0], [198, 172, 36, 1], [1, 0, 0, 0]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert text.tokenize(["a", "é!", ""]).tolist() == ids
    with pytest.warns(UserWarning, match="cut to 3 bytes"):
        assert text.tokenize(["é!?"]).tolist() == ids[1:2]
    assert torch.equal(text(["a", "é!", ""])[1], torch.tensor(ids) > 0)


def test_features_of_a_prompt_do_not_depend_on_the_batch():
    """Padding is masked in the text encoder too. Reference: the prompt alone.
    A later byte changes the first feature, and equal bytes differ by their place."""
    text = perturb(model.ByteText(12, 2, 2, 32))
    alone = text(["red"])[0]
    close(text(["red", "a much longer prompt"])[0][:1, :4], alone)
    assert not torch.allclose(text(["ren"])[0][:, 0], alone[:, 0], atol=1e-3)
    assert not torch.allclose(text(["aaa"])[0][0, 0], text(["aaa"])[0][0, 1], atol=1e-2)


def test_the_same_gradient_every_time_by_two_threads():
    """Many prompts share a byte; its gradient is summed in a fixed order, whatever the threads do.
    Reference: the first of four, torch.equal. The indexing embed[ids] fails here."""
    torch.set_num_threads(2)
    try:
        text = model.ByteText(128, depth=0, heads=1, length=96)
        found = []
        for _ in range(4):
            features = text(["a red square moving right " * 3] * 8)[0]
            found += torch.autograd.grad(features.sin().sum(), text.embed)
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
    """App. C: T frames give ceil(T / temporal) latents and come back as T frames, in tiles too."""
    tae = small_tae(spatial, temporal, tile=16)
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
    with pytest.raises(ValueError, match=re.escape(message)):
        model.TAE(**{**good, **words})


def convolutions(conv, x, s=1, t=1):
    """Conv by two 3-D convolutions, one frame deep and one pixel wide."""
    y = F.conv3d(x, conv.space.weight[:, :, None], conv.space.bias, (1, s, s), (0, 1, 1))
    y = F.pad(y, (0, 0, 0, 0, 1, 1), mode="replicate")
    return F.conv3d(y, conv.time.weight[..., None], conv.time.bias, (t, 1, 1))


@pytest.mark.parametrize("s, t, T", [(1, 1, 5), (2, 1, 1), (1, 2, 6), (2, 2, 5)])
def test_a_pair_of_convolutions(s, t, T):
    """Movie Gen: a 2-D convolution, then a 1-D one over time, not causal: both ends are replicated.
    Reference: 3-D convolutions; those of a ResBlock too, around SiLU and the identity."""
    x = torch.randn(2, 2, T, 6, 8)
    conv = perturb(model.Conv(2, 3, s, t))
    close(conv(x), convolutions(conv, x, s, t))
    block = perturb(model.ResBlock(2))
    inner = convolutions(block.conv1, F.silu(x))
    close(block(x), x + convolutions(block.conv2, F.silu(inner)))


def test_it_starts_as_an_image_autoencoder():
    """Temporal convolutions start as the identity: a still clip has the latents of its picture, and
    each decodes to the same four frames. Reference: the picture, as a clip of one frame. Residual
    branches start at zero. The log-variance starts at -6, and stays in its bounds."""
    torch.manual_seed(0)
    tae = model.TAE(4, (8, 8, 16), (1, 1), 4, 4)
    picture = random_video(1)
    z = tae.encode(picture.expand(-1, -1, 12, -1, -1))
    close(z, tae.encode(picture).expand_as(z))
    close(tae.decode(z, 12), tae.decode(z[:, :, :1], 4).repeat(1, 1, 3, 1, 1))
    x = torch.randn(1, 16, 3, 4, 4)
    assert torch.equal(tae.encoder[-3:](x), x)
    assert (tae.moments(torch.zeros(1, 3, 4, 8, 8))[1] == -6).all()
    assert tae.moments(1e6 * random_video(4))[1].aminmax() == (-30, 20)


@pytest.mark.parametrize("off, where", [("time", (1,)), ("space", (slice(None), 2, 3))])
def test_attention_in_space_and_over_time(off, where):
    """Attention inside a frame and then over time at a place. Reference: with the other one at
    zero, who notices that the number at frame 1, row 2, column 3 changes."""
    net = perturb(model.PixelAttention(8))
    zeroed(getattr(net, off))
    x = torch.randn(1, 8, 3, 4, 5)
    other = x.clone()
    other[:, 0, 1, 2, 3] += 1
    noticed = (net(x) - net(other)).abs().amax(dim=(0, 1)) > 1e-6
    expected = torch.zeros(3, 4, 5, dtype=torch.bool)
    expected[where] = True
    assert torch.equal(noticed, expected)


@pytest.mark.parametrize("s, t, T", [(2, 2, 6), (2, 2, 5), (2, 1, 3), (1, 2, 5)])
def test_shortcuts_copy_cells_to_channels_and_back(s, t, T):
    """Down puts each t x s x s cell into the channels, or means of them, and Up puts it back.
    Reference: the input, as the convolutions are zero and there is room for every number; an odd
    clip repeats its last frame. Up's convolution: of each pixel repeated."""
    down = zeroed(model.Down(2, 2 * t * s * s, s, t))
    up = zeroed(model.Up(2 * t * s * s, 2, s, t))
    x = torch.randn(2, 2, T, 4, 6)
    padded = torch.cat([x] + [x[:, :, -1:]] * (T % t), dim=2)
    cells = down(x)
    assert torch.equal(up(cells), padded)
    narrow = zeroed(model.Down(2, 2, s, t))(x)
    close(narrow.mean(dim=1), F.avg_pool3d(padded, (t, s, s)).mean(dim=1))
    copies = cells.repeat_interleave(t, 2).repeat_interleave(s, 3).repeat_interleave(s, 4)
    close(perturb(up)(cells), convolutions(up.conv, copies) + padded)


def test_shortcuts_around_the_latent():
    """A latent channel is a group's mean plus a convolution, and is copied back to its group.
    Reference: reshapes of what encoder and decoder see, with those convolutions at zero."""
    tae = small_tae()
    zeroed(tae.to_latent)
    zeroed(tae.from_latent)
    video = random_video(8)
    mean = tae.moments(video)[0]
    groups = tae.encoder(video).unflatten(1, (4, 4))        # (B, C, 4, T', H', W')
    close(mean, groups.mean(dim=2))
    copies = mean[:, :, None].expand_as(groups).flatten(1, 2)
    close(tae.reconstruct(mean), tae.decoder(copies))


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
        close(z * (mean + 4) + mean, plain, 1e-4)
        close(tae.decode(z, 8, motion), again, 1e-3)


def test_tiles_are_encoded_one_by_one():
    """App. C: constant memory, as no convolution is given more than `tile` frames.
    Reference: all their inputs, and each tile by itself."""
    tae = small_tae(tile=8)
    lengths = []
    for module in tae.modules():
        if isinstance(module, model.Conv):
            module.register_forward_pre_hook(lambda net, x: lengths.append(x[0].shape[2]))
    video = random_video(61, 8, 8)
    z = tae.encode(video)
    assert tae.decode(z, 61).shape == video.shape
    assert max(lengths) == 8
    close(z, torch.cat([tae.moments(part)[0] for part in video.split(8, dim=2)], dim=2))


@pytest.mark.parametrize("T", [8, 9, 12, 13, 16, 17, 31, 40])
def test_decoded_tiles_are_blended_linearly(T):
    """Tiles of 32 frames begin every 16. Reference: a decoder that repeats latents, and adds n to
    its n-th tile. Over the 16 frames that two tiles share, this number rises evenly by 1."""
    calls = []

    def numbered(z):
        calls.append(z.shape[2])
        return z[:, :3].repeat_interleave(4, dim=2) + len(calls) - 1

    tae = small_tae()
    tae.reconstruct = numbered
    z = torch.randn(1, 4, T, 1, 1)
    frame = torch.arange(4 * T).view(4 * T, 1, 1)
    number = (frame // 16 - 1 + frame % 16 / 15).clamp(0, math.ceil((T - 8) / 4))
    close(tae.decode(z, 4 * T), z[:, :3].repeat_interleave(4, dim=2) + number)
    assert max(calls) == 8


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
