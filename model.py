"""The networks of VideoJAM (paper sec. 4.1, 4.2, App. C; blocks as in Movie Gen).

    TAE       video <-> latent, 8x8x8 smaller (4x4x4 in `tiny`); the same net encodes appearance and painted optical flow
    ByteText  prompt -> features; bytes, trained together with the DiT. "No text" is the empty string.
    DiT       Eq. 4: u = M(x_t W_in, y, t) W_out; `add_motion()` is the surgery of sec. 4.2

Nothing runs here: the classes take plain arguments, common.py's builders alone know the config. Try
    python -c "import common; c = common.load_config(['preset=small']); print(common.build_dit(c))"

Letters: B batch, C latent channels, T H W latent frames, height, width (of pixels inside the TAE), p patch, N tokens,
D width of the net, L text tokens, t flow-matching time in [0, 1] (0 noise, 1 data).
"""
import functools
import hashlib
import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

# ---------------------------------------------------------------------------------------------------------------------
# The first weights. A large net is built without memory (device meta), sharded over the GPUs, and only then filled, tensor by tensor:
# no GPU ever holds more of it whole than one tensor.

@torch.no_grad()
def put_whole(w, whole):
    """Copy a tensor into w, which may be sharded (a DTensor): then rank 0's is dealt out."""
    if hasattr(w, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor                  # half a second of imports that sample.py can do without
        whole = distribute_tensor(whole.to(w.device), w.device_mesh, w.placements)
    w.copy_(whole)


def normal_(w, std=1.0):
    """Draw w ~ N(0, std²) from the global generator: the same numbers sharded or not."""
    if not w.is_meta:                                                           # there torch draws nothing, and imports its compiler for it: a second
        put_whole(w, torch.empty(w.shape, device=w.device).normal_(std=std))


def init_weights(net):
    """Every matrix and 2-D kernel starts at variance 1 / fan_in, norms at one; the owner then zeroes what must start at zero."""
    for m in net.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            normal_(m.weight, std=math.prod(m.weight.shape[1:]) ** -0.5)
        if isinstance(m, (nn.RMSNorm, nn.LayerNorm)):
            nn.init.ones_(m.weight)


# ---------------------------------------------------------------------------------------------------------------------
# Norm, attention and feed-forward, shared by the text encoder and the DiT: RMSNorm before, SwiGLU inside, no biases. Autograd would keep every
# intermediate result for the backward pass; the two gradients written out here keep the inputs and compute the rest again: a quarter less memory per block.

class Normed(torch.autograd.Function):
    """x r factor + shift, where r = (mean(x²) + eps)^(-1/2): RMSNorm and modulation in one. x (B, N, D); factor, shift (B, 1, D) or (D,). First derivatives only."""

    @staticmethod
    def forward(ctx, x, factor, shift, eps):
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))       # no x² of the size of x
        r = torch.rsqrt(length.square() / x.shape[-1] + eps)                    # (B, N, 1)
        ctx.save_for_backward(x, r, factor, shift)
        return (x * r).mul_(factor).add_(shift).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, r, factor, shift = ctx.saved_tensors
        y, dy = x * r, grad * factor
        dx = torch.addcmul(dy, y, (dy * y).mean(-1, keepdim=True), value=-1).mul_(r)    # r depends on x too: no gradient along y
        dshift = grad.sum_to_size(shift.shape) if ctx.needs_input_grad[2] else None
        return dx.to(x.dtype), y.mul_(grad).sum_to_size(factor.shape), dshift, None                # y itself is not needed any more


class Norm(nn.RMSNorm):
    """(1 + scale) RMSNorm(x) + shift, the modulation being optional: x (B, N, D); scale, shift (B, 1, D)."""

    def __init__(self, dim):
        super().__init__(dim, eps=torch.finfo(torch.float32).eps)

    def forward(self, x, scale=0.0, shift=None):
        y = Normed.apply(x, self.weight * (1 + scale), x.new_zeros(1) if shift is None else shift, self.eps)
        autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
        return y.to(torch.get_autocast_dtype(x.device.type)) if autocast else y     # once; autocast would, for each product with y


class Attention(nn.Module):
    """Full attention of x (B, N, D) on itself, or on text (B, L, D) under a mask (B, L), True = look at it."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x, text=None, mask=None):
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)     # (B, N, D) -> (B, heads, N, D/heads)
        text = x if text is None else text
        mask = None if mask is None else mask[:, None, None, :]                 # (B, 1, 1, L)
        y = F.scaled_dot_product_attention(split(self.q(x)), split(self.k(text)), split(self.v(text)), attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


class Gated(torch.autograd.Function):
    """h W^T, where h = silu(gate) * value: gate, value (B, N, hidden), W (D, hidden)."""

    @staticmethod
    def forward(ctx, gate, value, W):
        ctx.save_for_backward(gate, value, W)
        return F.linear(F.silu(gate).mul_(value), W)

    @staticmethod
    def backward(ctx, grad):
        gate, value, W = ctx.saved_tensors
        silu = F.silu(gate)
        h, dh = (silu * value).to(grad.dtype), grad @ W.to(grad.dtype)          # under autocast grad is bf16, W fp32
        dW = grad.flatten(0, -2).T @ h.flatten(0, -2)
        return torch.ops.aten.silu_backward(dh * value, gate), dh * silu, dW.to(W.dtype)


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.gate, self.up = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return Gated.apply(self.gate(x), self.up(x), self.down.weight)          # down(silu(gate(x)) * up(x))


# ---------------------------------------------------------------------------------------------------------------------
# Text: y in the paper's equations.

class ByteText(nn.Module):
    """Bytes -> a small bidirectional transformer, trained with the DiT. Ids are ByT5's: byte + 3, pad 0, end 1.

    text(list of B str) -> features (B, L, D), mask (B, L) bool, True = a real token. Longer prompts are cut, with a warning.
    """

    def __init__(self, dim, depth, heads, length):
        super().__init__()
        self.length = length
        self.embed = nn.Embedding.from_pretrained(torch.empty(259, dim), freeze=False)          # nothing is drawn here: init does
        self.position = nn.Parameter(torch.empty(length, dim))
        self.blocks = nn.ModuleList(nn.ModuleDict(dict(
            norm1=Norm(dim), attn=Attention(dim, heads), norm2=Norm(dim), ffn=SwiGLU(dim, 2 * dim)))
            for _ in range(depth))
        self.norm = Norm(dim)
        self.init()

    def init(self):
        init_weights(self)
        normal_(self.embed.weight)
        normal_(self.position)

    def tokenize(self, prompts):
        rows = []
        for prompt in prompts:
            ids = [byte + 3 for byte in prompt.encode()]
            if len(ids) >= self.length:
                warnings.warn(f"prompt of {len(ids)} bytes cut to {self.length - 1} (text.length - 1): {prompt!r}")
            rows.append(ids[:self.length - 1] + [1])                            # the empty prompt is the end token alone
        longest = max(map(len, rows))
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows])

    def forward(self, prompts):
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}               # b different ones: "" once for all that are dropped
        ids = self.tokenize(rows).to(self.position.device)                      # (b, L)
        mask = ids != 0                                                         # (b, L)
        x = self.embed(ids) + self.position[:ids.shape[1]]                      # (b, L, D)
        for block in self.blocks:
            y = block.norm1(x)                                                  # (b, L, D)
            x = x + block.attn(y, y, mask)                                      # (b, L, D)
            x = x + block.ffn(block.norm2(x))                                   # (b, L, D)
        each = torch.tensor([rows[prompt] for prompt in prompts], device=x.device)              # (B,)
        return self.norm(x.index_select(0, each)), mask[each]                   # (B, L, D), (B, L); x[each] adds gradients in any order


class RandomText(nn.Module):
    """Stand-in for the paper's frozen UL2, ByT5 and MetaCLIP: fixed random features of their widths, a function of the prompt.

    text(list of B str) -> lists with one entry per encoder: features (B, length, width), mask (B, length). For speed and memory only.
    """

    def __init__(self, widths, length):
        super().__init__()
        self.widths, self.length = widths, length
        self.register_buffer("where", torch.zeros(0), persistent=False)         # knows the device

    def init(self):
        pass                                                                    # nothing to draw

    def forward(self, prompts):
        features = []
        for k, width in enumerate(self.widths):
            seeds = [int.from_bytes(hashlib.blake2b(f"{k} {prompt}".encode(), digest_size=7).digest(), "big") for prompt in prompts]
            rows = [torch.randn(self.length, width, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            features.append(torch.stack(rows).to(self.where.device))
        masks = [torch.ones(len(prompts), self.length, dtype=torch.bool, device=self.where.device) for _ in self.widths]
        return features, masks


# ---------------------------------------------------------------------------------------------------------------------
# DiT, Eq. 4.

aten = torch.ops.aten
# What scaled_dot_product_attention may run, by device; not its fallback (MATH, train.py's choice on CPUs in bf16), which has no single output to keep.
ATTENTION = [aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_efficient_attention.default,
             aten._scaled_dot_product_cudnn_attention.default, aten._scaled_dot_product_flash_attention_for_cpu.default]


class Block(nn.Module):
    """Self-attention over all video tokens, cross-attention to the text, feed-forward; gates start at zero (App. C).

    block(x (B, N, D), c (B, 6, D) the modulation, text (B, L, D), mask (B, L)) -> (B, N, D). checkpointing, of activations for the backward pass: "none"
    keeps them all; "full" the block's inputs alone, and computes the rest again; "attention" also the attention outputs: most FLOPs saved per byte.
    """

    def __init__(self, dim, heads, hidden, checkpointing="none"):
        super().__init__()
        self.checkpointing = checkpointing
        self.norm1, self.norm2, self.norm3 = Norm(dim), Norm(dim), Norm(dim)
        self.attn, self.cross, self.ffn = Attention(dim, heads), Attention(dim, heads), SwiGLU(dim, hidden)
        self.table = nn.Parameter(torch.zeros(6, dim))                          # this block's own part of the modulation

    def forward(self, x, c, text, mask):
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return self.compute(x, c, text, mask)
        policy = {"context_fn": functools.partial(create_selective_checkpoint_contexts, ATTENTION)} if self.checkpointing == "attention" else {}
        return checkpoint(self.compute, x, c, text, mask, use_reentrant=False, **policy)

    def compute(self, x, c, text, mask):
        scale1, shift1, gate1, scale2, shift2, gate2 = (self.table + c)[:, :, None].unbind(1)    # 6 x (B, 1, D)
        x = x + gate1 * self.attn(self.norm1(x, scale1, shift1))                # (B, N, D)
        x = x + self.cross(self.norm2(x), text, mask)                           # (B, N, D)
        x = x + gate2 * self.ffn(self.norm3(x, scale2, shift2))                 # (B, N, D)
        return x


class DiT(nn.Module):
    """u(x_t, y, t) of Eq. 4; after `add_motion()` u+([x_t, d_t], y, t), which predicts both velocities (sec. 4.2).

    dit(x, t, text, mask): x (B, C, T, H, W), or (B, 2C, T, H, W) after add_motion(); t (B,); text (B, L, D_text), mask (B, L) bool,
    or lists of them, one per encoder. Returns the shape of x. Raises ValueError where x has another size than it was built for.
    """

    def __init__(self, channels, frames, height, width, dim, depth, heads, hidden, text_dims, patch=2, motion=False, checkpointing="none"):
        super().__init__()
        self.size, self.patch = (channels, frames, height, width), patch
        self.patch_in = nn.Linear(channels * patch ** 2, dim, bias=False)       # W_in
        self.pos_t = nn.Parameter(torch.empty(frames, 1, 1, dim))               # learnable, factorised
        self.pos_h = nn.Parameter(torch.empty(1, height // patch, 1, dim))
        self.pos_w = nn.Parameter(torch.empty(1, 1, width // patch, dim))
        self.time = nn.Sequential(nn.Linear(256, dim, bias=False), nn.SiLU(), nn.Linear(dim, dim, bias=False), nn.SiLU())
        self.modulation = nn.Linear(dim, 6 * dim, bias=False)                   # one for all blocks
        self.text_in = nn.ModuleList(nn.Linear(d, dim, bias=False) for d in text_dims)
        self.text_norm = nn.ModuleList(nn.LayerNorm(dim, bias=False) for _ in text_dims)
        self.blocks = nn.ModuleList(Block(dim, heads, hidden, checkpointing) for _ in range(depth))
        self.norm = Norm(dim)
        self.table = nn.Parameter(torch.zeros(2, dim))                          # scale and shift before W_out
        self.patch_out = nn.Linear(dim, channels * patch ** 2, bias=False)      # W_out
        self.motion_in = self.motion_out = None
        self.init()
        if motion:
            self.add_motion()

    def init(self):
        init_weights(self)
        for position in (self.pos_t, self.pos_h, self.pos_w):
            normal_(position, std=0.2)                                          # beside tokens of size 1: 0.02 stays unseen for hundreds of steps
        # The net starts as the zero function and every block as the identity: gates, cross-attention and W_out are zero.
        for zero in [self.modulation, self.patch_out, *(block.cross.out for block in self.blocks)]:
            nn.init.zeros_(zero.weight)
        for table in [self.table, *(block.table for block in self.blocks)]:
            nn.init.zeros_(table)
        if self.motion_in:
            self.init_motion()

    def init_motion(self):
        nn.init.zeros_(self.motion_in.weight)                                   # ignores d at the start (the paper's zero rows)
        nn.init.zeros_(self.motion_out.weight)                                  # predicts no motion at the start (our choice)

    # sec. 4.2. W_in+ = [W_in; 0] and W_out+ = [W_out, W_d] are kept as their two blocks: [x, d] W_in+ = x W_in + d 0. So the widened
    # net equals the base DiT to the last bit for any d, and the base's weights keep their names.
    def add_motion(self):
        """The surgery: zero rows for d in W_in, a second output matrix in W_out. Afterwards x has 2C channels, [x, d]."""
        like = self.patch_in.weight
        self.motion_in = nn.Linear(self.patch_in.in_features, self.patch_in.out_features, bias=False, device=like.device, dtype=like.dtype)
        self.motion_out = nn.Linear(self.patch_out.in_features, self.patch_out.out_features, bias=False, device=like.device, dtype=like.dtype)
        self.init_motion()
        return self

    def patchify(self, x):
        return F.pixel_unshuffle(x.transpose(1, 2), self.patch).permute(0, 1, 3, 4, 2)      # (B, T, H/p, W/p, C p p)

    def unpatchify(self, x):
        return F.pixel_shuffle(x.permute(0, 1, 4, 2, 3), self.patch).transpose(1, 2).contiguous()           # (B, C, T, H, W)

    def forward(self, x, t, text, mask):
        C, T, H, W = self.size
        expected = ((2 if self.motion_in else 1) * C, T, H, W)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"DiT: found a latent of shape {tuple(x.shape[1:])}, expected {expected} (channels, frames, height, width)")
        if torch.is_tensor(text):
            text, mask = [text], [mask]
        y = torch.cat([norm(lin(f)) for lin, norm, f in zip(self.text_in, self.text_norm, text)], dim=1)    # (B, L, D)
        mask = torch.cat(mask, dim=1)                                           # (B, L)
        e = self.time(timestep_embedding(t).to(x.dtype))                        # (B, D)
        c = self.modulation(e).unflatten(1, (6, -1))                            # (B, 6, D)
        h = self.patch_in(self.patchify(x[:, :C]))                              # (B, T, H/p, W/p, D)
        if self.motion_in:
            h = h + self.motion_in(self.patchify(x[:, C:]))                     # (B, T, H/p, W/p, D)
        h = h.flatten(1, 3)                                                     # (B, N, D)
        position = (self.pos_t + self.pos_h + self.pos_w).flatten(0, 2)         # (N, D)
        for block in self.blocks:
            h = block(h + position, c, y, mask)                                 # (B, N, D)
        scale, shift = (self.table + e[:, None])[:, :, None].unbind(1)          # 2 x (B, 1, D)
        h = self.norm(h, scale, shift)                                          # (B, N, D)
        h = h.unflatten(1, (T, H // self.patch, W // self.patch))               # (B, T, H/p, W/p, D)
        u = self.unpatchify(self.patch_out(h))                                  # (B, C, T, H, W)
        if self.motion_out:
            u = torch.cat([u, self.unpatchify(self.motion_out(h))], dim=1)      # (B, 2C, T, H, W)
        return u


def timestep_embedding(t, dim=256):
    """t (B,) in [0, 1] -> (B, dim) cosines and sines of 1000 t at geometric frequencies."""
    frequency = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = 1000 * t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# TAE. All tensors are (B, C, T, H, W); a 2-D convolution is a 3-D one that is one frame deep, a temporal one is one pixel wide.

class Conv(nn.Module):
    """A 2-D 3x3 convolution followed by a 1-D one over 3 frames, either with stride 2 on request (Movie Gen's TAE). Between the two each frame may be repeated, r times."""

    def __init__(self, c_in, c_out, stride_s=1, stride_t=1):
        super().__init__()
        self.space = nn.Conv2d(c_in, c_out, 3, stride_s, padding=1)
        self.time = nn.Conv2d(c_out, c_out, (3, 1), (stride_t, 1))              # on (B, C, T, HW)

    def forward(self, x, repeat=1):
        B = len(x)
        x = self.space(x.transpose(1, 2).flatten(0, 1))                         # (B T, c_out, H', W')
        H, W = x.shape[2:]
        x = x.unflatten(0, (B, -1)).transpose(1, 2).flatten(3)                  # (B, c_out, T, H'W')
        frames = [frame for frame in x.split(1, dim=2) for _ in range(repeat)]  # split, not x[:, :, :1], whose gradient is as large as x
        x = torch.cat([frames[0], *frames, frames[-1]], dim=2)                  # (B, c_out, rT+2, H'W'), ends replicated, not causal
        del frames                                                              # they would keep the memory of the old x
        return self.time(x).unflatten(3, (H, W))                                # (B, c_out, T', H', W')


class ResBlock(nn.Module):
    """Two convolutions around the identity. No norm: a frame's grey level is part of the picture, and no statistic crosses a tile's border."""

    def __init__(self, dim):
        super().__init__()
        self.conv1, self.conv2 = Conv(dim, dim), Conv(dim, dim)

    def forward(self, x):
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class PixelAttention(nn.Module):
    """Attention within each frame, then over time at each place (at the lowest resolution only)."""

    def __init__(self, dim):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.space, self.time = Attention(dim, max(1, dim // 64)), Attention(dim, max(1, dim // 64))

    def forward(self, x):
        B, C, T, H, W = x.shape
        x = x.permute(0, 2, 3, 4, 1).reshape(B * T, H * W, C)
        x = x + self.space(self.norm1(x))
        x = x.view(B, T, H * W, C).transpose(1, 2).reshape(B * H * W, T, C)
        x = x + self.time(self.norm2(x))
        return x.view(B, H, W, T, C).permute(0, 4, 3, 1, 2)


class Down(nn.Module):
    """Stride-2 convolution plus a shortcut without parameters: each 2x2 (x2) cell goes to the channels, averaged to c_out."""

    def __init__(self, c_in, c_out, stride_s, stride_t):
        super().__init__()
        self.s, self.t, self.c_out = stride_s, stride_t, c_out
        self.conv = Conv(c_in, c_out, stride_s, stride_t)

    def forward(self, x):
        B, C, T, H, W = x.shape
        y = self.conv(x)                                                        # (B, c_out, ceil(T/t), H/s, W/s)
        x = torch.cat([x, x[:, :, -1:]], dim=2) if T % self.t else x            # an odd clip repeats its last frame
        x = x.permute(0, 2, 3, 4, 1)                                            # channels last: the copy below moves runs of memory
        x = x.reshape(B, -1, self.t, H // self.s, self.s, W // self.s, self.s, C)
        x = x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(B, *y.shape[2:], self.c_out, -1).mean(-1)
        return x.permute(0, 4, 1, 2, 3) + y


class Up(nn.Module):
    """Nearest neighbour and a convolution, plus the mirror image of Down's shortcut: channels are copied back to the cell."""

    def __init__(self, c_in, c_out, stride_s, stride_t):
        super().__init__()
        self.s, self.t, self.c_out = stride_s, stride_t, c_out
        self.conv = Conv(c_in, c_out)

    def forward(self, x):
        B, C, T, H, W = x.shape
        y = F.interpolate(x, scale_factor=(1, self.s, self.s))                  # (B, C, T, sH, sW)
        y = self.conv(y, repeat=self.t)                                         # (B, c_out, tT, sH, sW); copied in time after the 2-D convolution, the same for each copy
        cell = self.t * self.s ** 2
        x = x.repeat_interleave(self.c_out * cell // C, dim=1).view(B, self.t, self.s, self.s, self.c_out, T, H, W)
        return y + x.permute(0, 4, 5, 1, 6, 2, 7, 3).reshape(y.shape)


class TAE(nn.Module):
    """Temporal auto-encoder (App. C): video (B, 3, T, H, W) in [-1, 1] <-> latent (B, C, ceil(T/temporal), H/spatial, W/spatial).

    One net serves both streams; `statistics` (2 streams, mean and std, C) brings either to zero mean and unit variance.
    Any T works; an image is a clip of one frame. Raises ValueError where H or W is no multiple of `spatial`.
    """

    def __init__(self, channels=16, widths=(16, 32, 64), blocks=(1, 1), spatial=4, temporal=4, tile=32):
        super().__init__()
        levels = len(widths) - 1
        strides = [(2 if 2 ** (i + 1) <= spatial else 1, 2 if 2 ** (i + 1) <= temporal else 1) for i in range(levels)]
        if widths[-1] % channels:
            raise ValueError(f"TAE: found a last width of {widths[-1]} and {channels} latent channels, expected a multiple")
        if math.prod(s for s, _ in strides) != spatial or math.prod(t for _, t in strides) != temporal:
            raise ValueError(f"TAE: found factors {spatial} and {temporal} with {levels + 1} widths, expected powers of two up to {2 ** levels}")
        for i, (s, t) in enumerate(strides):
            if widths[i] * s * s * t % widths[i + 1]:
                raise ValueError(f"TAE: found widths {widths[i]}, {widths[i + 1]}, expected the second to divide {widths[i] * s * s * t}, a cell of the first (the shortcuts)")
        self.channels, self.spatial, self.temporal, self.tile = channels, spatial, temporal, tile
        stage = lambda i: [ResBlock(widths[i]) for _ in range(blocks[i])]
        middle = lambda: [ResBlock(widths[-1]), PixelAttention(widths[-1]), ResBlock(widths[-1])]
        end = lambda c, c_out: nn.Sequential(nn.SiLU(), Conv(c, c_out))
        encoder, decoder = [Conv(3, widths[0])], middle()
        for i, (s, t) in enumerate(strides):
            encoder += [*stage(i), Down(widths[i], widths[i + 1], s, t)]
        for i, (s, t) in reversed(list(enumerate(strides))):
            decoder += [Up(widths[i + 1], widths[i], s, t), *stage(i)]
        self.encoder, self.to_latent = nn.Sequential(*encoder, *middle()), end(widths[-1], 2 * channels)
        self.from_latent, self.decoder = Conv(channels, widths[-1]), nn.Sequential(*decoder, end(widths[0], 3))
        self.register_buffer("statistics", torch.tensor([0.0, 1.0])[None, :, None].repeat(2, 1, channels))
        self.init()

    @torch.no_grad()
    def init(self):
        init_weights(self)
        for m in self.modules():
            if isinstance(m, Conv):
                nn.init.zeros_(m.space.bias)
                nn.init.dirac_(m.time.weight)                                   # the identity: the net starts as an image autoencoder
                nn.init.zeros_(m.time.bias)
        for m in self.modules():                                                # residual branches start at zero
            if isinstance(m, ResBlock):
                nn.init.zeros_(m.conv2.space.weight)
            if isinstance(m, PixelAttention):
                nn.init.zeros_(m.space.out.weight)
                nn.init.zeros_(m.time.out.weight)
        self.to_latent[-1].time.bias[self.channels:] = -6                       # log-variance: hardly any noise before the means say something

    def moments(self, video):
        """video (B, 3, T, H, W) -> mean and log-variance of the posterior, each (B, C, T', H', W'), not normalised."""
        if video.shape[-2] % self.spatial or video.shape[-1] % self.spatial:
            raise ValueError(f"TAE: found {video.shape[-1]}x{video.shape[-2]} pixels, expected multiples of {self.spatial}")
        h = self.encoder(video.contiguous(memory_format=torch.channels_last_3d))                # (B, D, T', H', W')
        mean, logvar = self.to_latent(h).chunk(2, dim=1)                        # (B, C, T', H', W') each
        return mean + h.unflatten(1, (self.channels, -1)).mean(2), logvar.clamp(-30, 20)        # the same shortcut as in Down

    def reconstruct(self, latent):
        """Latent (B, C, T', H', W'), not normalised -> video (B, 3, temporal T', H, W)."""
        copies = self.from_latent.time.out_channels // self.channels
        return self.decoder(self.from_latent(latent) + latent.repeat_interleave(copies, dim=1)) # the same shortcut as in Up

    def scale(self, motion):
        return self.statistics[int(motion), :, :, None, None, None]             # 2 x (C, 1, 1, 1): mean and std

    def encode(self, video, motion=False):
        """video (B, 3, T, H, W) -> normalised latent (B, C, ceil(T/temporal), H/spatial, W/spatial), tile by tile."""
        latent = torch.cat([self.moments(v)[0] for v in video.split(self.tile, dim=2)], dim=2)
        mean, std = self.scale(motion)
        return (latent - mean) / std

    def decode(self, latent, frames, motion=False):
        """Normalised latent (B, C, T', H', W') -> video (B, 3, frames, H, W), tiles overlapping by half, blended linearly."""
        if math.ceil(frames / self.temporal) != latent.shape[2]:
            raise ValueError(f"TAE: found {latent.shape[2]} latent frames, expected {math.ceil(frames / self.temporal)} for {frames} frames")
        mean, std = self.scale(motion)
        latent = latent * std + mean
        size, hop = self.tile // self.temporal, self.tile // self.temporal // 2
        video = self.reconstruct(latent[:, :, :size])
        for start in range(hop, latent.shape[2] - hop, hop):                    # each tile begins in the middle of the last
            new = self.reconstruct(latent[:, :, start:start + size])
            overlap = video.shape[2] - start * self.temporal
            weight = (torch.arange(overlap, device=video.device, dtype=video.dtype) + 0.5)[:, None, None] / overlap
            blend = torch.lerp(video[:, :, -overlap:], new[:, :, :overlap], weight)
            video = torch.cat([video[:, :, :-overlap], blend, new[:, :, overlap:]], dim=2)
        return video[:, :, :frames]                                             # the tail that rounding up added goes
