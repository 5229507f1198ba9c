"""The networks of VideoJAM (sec. 4.1, 4.2, App. C), built from the blocks of Movie Gen.

    ByteText  prompt -> features y. It reads bytes and is trained together with the DiT.
    DiT       Eq. 4: u = M(x_t W_in, y, t) W_out. `add_motion()` is the surgery of sec. 4.2.
    TAE       video <-> latent. The same net encodes appearance and painted optical flow.

Letters: B batch, C latent channels, T H W latent frames, height, width (of pixels inside the TAE),
p patch, N tokens = T H/p W/p, D width of the net, L text tokens, t time in [0, 1], 0 is noise.
"""
import copy
import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# -------------------------------------------------------------------------------------------------
# First weights. A large net is built without memory (on the device "meta"), sharded over the GPUs,
# and then filled tensor by tensor, so that no GPU ever holds more than one whole tensor.

@torch.no_grad()
def put_whole(w, whole):
    """Copy a whole tensor into w. If w is sharded (a DTensor), rank 0 sends each rank its part."""
    if hasattr(w, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor
        whole = distribute_tensor(whole.to(w.device), w.device_mesh, w.placements)
    w.copy_(whole)


def init_normal(w, std):
    """w ~ N(0, std^2) from torch's global generator: the same numbers, sharded or not."""
    if not w.is_meta:
        put_whole(w, std * torch.randn(w.shape, device=w.device))


def init_layers(net):
    """Matrices and kernels get the variance 1 / fan_in, norms the weight 1, biases 0."""
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            fan_in = math.prod(module.weight.shape[1:])
            init_normal(module.weight, std=fan_in ** -0.5)
        if isinstance(module, (RMSNorm, nn.LayerNorm)):
            nn.init.ones_(module.weight)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


# -------------------------------------------------------------------------------------------------
# What the text encoder and the DiT are made of. No biases, as in Movie Gen.

class RMSNorm(nn.Module):
    """weight * x / rms(x), in fp32 even where FSDP hands out weights in bf16."""
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), eps=1e-6)


class Attention(nn.Module):
    """Full attention of x (B, N, D) on y (B, L, D), where the mask (B, 1, 1, L) is True."""
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def split_heads(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)  # (..., heads, N, D/heads)

    def forward(self, x, y, mask=None):
        q = self.split_heads(self.q(x))
        k = self.split_heads(self.k(y))
        v = self.split_heads(self.v(y))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(x.transpose(-3, -2).flatten(-2))  # (..., N, D)


class SwiGLU(nn.Module):
    """The feed-forward network: down(silu(gate(x)) * up(x))."""
    def __init__(self, dim, hidden):
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


# -------------------------------------------------------------------------------------------------
# Text: y in the paper's equations

class TextBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = RMSNorm(dim)
        self.ffn = SwiGLU(dim, 2 * dim)

    def forward(self, x, mask):
        y = self.norm1(x)
        x = x + self.attn(y, y, mask)
        return x + self.ffn(self.norm2(x))


class ByteText(nn.Module):
    """A small transformer over the bytes of a prompt. "No text" is the empty string.

    text(list of B strings) -> features (B, L, D) and mask (B, L), True where there is a token.
    The paper uses three large frozen encoders instead (App. C).
    """
    def __init__(self, dim, depth, heads, length):
        super().__init__()
        self.length = length
        self.embed = nn.Parameter(torch.empty(259, dim))
        self.position = nn.Parameter(torch.empty(length, dim))
        self.blocks = nn.ModuleList(TextBlock(dim, heads) for _ in range(depth))
        self.norm = RMSNorm(dim)
        self.init()

    def init(self):
        """Draw the first weights."""
        init_layers(self)
        init_normal(self.embed, std=1.0)
        init_normal(self.position, std=1.0)

    def tokenize(self, prompts, least=0):
        """B strings -> ids (B, L) as ByT5 numbers them: padding 0, end 1, a byte is itself + 3."""
        rows = []
        room = self.length - 1  # for the end token, which the empty prompt has too
        for prompt in prompts:
            ids = [byte + 3 for byte in prompt.encode()]
            if len(ids) > room:
                warnings.warn(f"prompt cut to {room} bytes (text.length): {prompt!r}")
            ids = ids[:room] + [1]
            rows.append(torch.tensor(ids + [0] * (least - len(ids))))
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def forward(self, prompts):
        cuda = self.position.is_cuda  # whose compilers and kernels stumble over changing lengths
        ids = self.tokenize(prompts, self.length if cuda else 0)  # (B, L)
        ids = (ids.pin_memory() if cuda else ids).to(self.position.device, non_blocking=cuda)
        mask = ids != 0
        x = (F.embedding(ids, self.embed) + self.position[:ids.shape[1]]).float()  # (B, L, D)
        for block in self.blocks:
            x = block(x, mask[:, None, None])
        return self.norm(x), mask


# -------------------------------------------------------------------------------------------------
# The diffusion transformer

def timestep_embedding(t):
    """t (B,) in [0, 1] -> (B, 256): cosines and sines of 1000 t at geometric frequencies."""
    frequency = 1e-4 ** (torch.arange(128, device=t.device) / 128)
    angle = 1000 * t[:, None] * frequency  # (B, 128)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def modulate(x, scale, shift):
    return x * (1 + scale) + shift


class Block(nn.Module):
    """Self-attention over all video tokens, cross-attention to the text, feed-forward (App. C)."""
    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = RMSNorm(dim)
        self.cross = Attention(dim, heads)
        self.norm3 = RMSNorm(dim)
        self.ffn = SwiGLU(dim, hidden)
        self.table = nn.Parameter(torch.zeros(6, dim))  # this block's own part of the modulation

    def forward(self, x, c, text, mask):
        """x (B, N, D), modulation c (B, 6, D), text (B, L, D), mask (B, 1, 1, L) -> (B, N, D)"""
        modulation = (self.table + c).split(1, dim=1)  # 6 x (B, 1, D)
        scale1, shift1, gate1, scale2, shift2, gate2 = modulation
        y = modulate(self.norm1(x), scale1, shift1)
        x = x + gate1 * self.attn(y, y)
        x = x + self.cross(self.norm2(x), text, mask)
        y = modulate(self.norm3(x), scale2, shift2)
        return x + gate2 * self.ffn(y)


class DiT(nn.Module):
    """u(x_t, y, t) of Eq. 4; after `add_motion()` u+([x_t, d_t], y, t) of sec. 4.2.

    x (B, C, T, H, W), with motion (B, 2C, T, H, W); t (B,); text (B, L, D_text), mask (B, L), or
    lists of them, one per text encoder -> the shape of x. ValueError for a latent of another size.
    """
    def __init__(self, channels, frames, height, width, dim, depth, heads, text_dims, patch=2,
                 motion=False, checkpointing=False):
        super().__init__()
        self.size = (channels, frames, height, width)
        self.patch = patch
        self.checkpointing = checkpointing
        inside = channels * patch ** 2  # numbers in a patch
        hidden = 64 * round(dim * 8 / 3 / 64)

        self.patch_in = nn.Linear(inside, dim, bias=False)  # W_in
        self.pos_t = nn.Parameter(torch.empty(frames, 1, 1, dim))
        self.pos_h = nn.Parameter(torch.empty(1, height // patch, 1, dim))
        self.pos_w = nn.Parameter(torch.empty(1, 1, width // patch, dim))
        self.time = nn.Sequential(
            nn.Linear(256, dim, bias=False), nn.SiLU(),
            nn.Linear(dim, dim, bias=False), nn.SiLU())
        self.modulation = nn.Linear(dim, 6 * dim, bias=False)  # shared by all blocks
        self.text_in = nn.ModuleList(nn.Linear(d, dim, bias=False) for d in text_dims)
        self.text_norm = nn.ModuleList(nn.LayerNorm(dim, bias=False) for _ in text_dims)
        self.blocks = nn.ModuleList(Block(dim, heads, hidden) for _ in range(depth))
        self.norm = RMSNorm(dim)
        self.table = nn.Parameter(torch.zeros(2, dim))  # scale and shift before W_out
        self.patch_out = nn.Linear(dim, inside, bias=False)  # W_out
        self.motion_in = None
        self.motion_out = None
        self.init()
        if motion:
            self.add_motion()

    def init(self):
        """Draw the first weights. The net starts as zero, and each block as the identity."""
        init_layers(self)
        # The tokens have size 1. Positions of 0.02, as usual, stay unseen for hundreds of steps.
        for position in (self.pos_t, self.pos_h, self.pos_w):
            init_normal(position, std=0.2)
        for weight in (self.modulation.weight, self.table, self.patch_out.weight):
            nn.init.zeros_(weight)
        for block in self.blocks:
            nn.init.zeros_(block.table)
            nn.init.zeros_(block.cross.out.weight)
        if self.motion_in is not None:
            self.init_motion()

    # Sec. 4.2. The paper widens two matrices: W_in+ = [W_in; 0] and W_out+ = [W_out, W_d]. Here
    # each part is a layer of its own, as [x, d] W_in+ = x W_in + d 0. So the widened net equals
    # the base to the last bit, whatever d is, and the weights of the base keep their names.
    def add_motion(self):
        """The surgery: from now on the net reads [x, d] and predicts a velocity for both."""
        self.motion_in = copy.deepcopy(self.patch_in)       # the same size, device and type
        self.motion_out = copy.deepcopy(self.patch_out)
        self.init_motion()
        return self

    def init_motion(self):
        nn.init.zeros_(self.motion_in.weight)  # the zero rows of the paper: d is ignored
        nn.init.zeros_(self.motion_out.weight)  # our choice: the velocity of d is 0

    def patchify(self, x):
        """(B, C, T, H, W) -> (B, T, H/p, W/p, C p p)"""
        return F.pixel_unshuffle(x.transpose(1, 2), self.patch).movedim(2, -1)

    def unpatchify(self, x):
        """(B, T, H/p, W/p, C p p) -> (B, C, T, H, W)"""
        return F.pixel_shuffle(x.movedim(-1, 2), self.patch).transpose(1, 2).contiguous()

    def forward(self, x, t, text, mask):
        C, T, H, W = self.size
        streams = 1 if self.motion_in is None else 2
        expected = (streams * C, T, H, W)
        if x.shape[1:] != expected:
            raise ValueError(f"DiT: found a latent of shape {tuple(x.shape[1:])}, "
                             f"expected {expected} (channels, frames, height, width)")
        if torch.is_tensor(text):
            text = [text]
            mask = [mask]
        encoders = zip(self.text_in, self.text_norm, text)
        y = torch.cat([norm(project(f)) for project, norm, f in encoders], dim=1)  # (B, L, D)
        mask = torch.cat(mask, dim=1)[:, None, None]  # (B, 1, 1, L)
        e = self.time(timestep_embedding(t).to(x.dtype))  # (B, D)
        c = self.modulation(e).unflatten(1, (6, -1))  # (B, 6, D)

        h = self.patch_in(self.patchify(x[:, :C]))  # (B, T, H/p, W/p, D)
        if self.motion_in is not None:
            h = h + self.motion_in(self.patchify(x[:, C:]))
        grid = h.shape[1:4]
        h = h.flatten(1, 3).float()  # (B, N, D), and the sum over all blocks stays in fp32
        position = (self.pos_t + self.pos_h + self.pos_w).flatten(0, 2)  # (N, D)
        for block in self.blocks:
            h = h + position
            if self.checkpointing:
                h = checkpoint(block, h, c, y, mask, use_reentrant=False)
            else:
                h = block(h, c, y, mask)

        scale, shift = (self.table + e[:, None]).split(1, dim=1)  # (B, 1, D) each
        h = modulate(self.norm(h), scale, shift).unflatten(1, grid)  # (B, T, H/p, W/p, D)
        u = self.unpatchify(self.patch_out(h))  # (B, C, T, H, W)
        if self.motion_out is not None:
            u_motion = self.unpatchify(self.motion_out(h))
            u = torch.cat([u, u_motion], dim=1)  # (B, 2C, T, H, W)
        return u


# -------------------------------------------------------------------------------------------------
# The temporal autoencoder. Its tensors are (B, C, T, H, W), with the channels last in memory.

class Conv(nn.Module):
    """A 3x3 convolution inside each frame, then one over 3 frames: on CPUs faster than 3-D."""
    def __init__(self, c_in, c_out, stride_space=1, stride_time=1):
        super().__init__()
        self.space = nn.Conv2d(c_in, c_out, 3, stride_space, padding=1)
        self.time = nn.Conv2d(c_out, c_out, (3, 1), (stride_time, 1))

    def forward(self, x):
        B = len(x)
        x = self.space(x.transpose(1, 2).flatten(0, 1))  # (B T, c_out, H/s, W/s)
        size = x.shape[2:]
        x = x.unflatten(0, (B, -1)).transpose(1, 2).flatten(3)  # (B, c_out, T, H W / s s)
        frames = x.split(1, dim=2)
        x = torch.cat([frames[0], *frames, frames[-1]], dim=2)  # not causal: the ends are repeated
        return self.time(x).unflatten(3, size)  # (B, c_out, T/t, H/s, W/s)


class ResBlock(nn.Module):
    """Two convolutions around the identity. No norm: brightness is part of the picture."""
    def __init__(self, dim):
        super().__init__()
        self.conv1 = Conv(dim, dim)
        self.conv2 = Conv(dim, dim)

    def forward(self, x):
        h = self.conv1(F.silu(x))
        return x + self.conv2(F.silu(h))


class PixelAttention(nn.Module):
    """Attention inside each frame, then over time at each place."""
    def __init__(self, dim):
        super().__init__()
        heads = max(1, dim // 64)
        self.norm1 = nn.LayerNorm(dim)
        self.space = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.time = Attention(dim, heads)

    def forward(self, x):
        size = x.shape[3:]
        x = x.flatten(3).movedim(1, -1)  # (B, T, H W, C)
        y = self.norm1(x)
        x = x + self.space(y, y)
        x = x.transpose(1, 2)  # (B, H W, T, C)
        y = self.norm2(x)
        x = x + self.time(y, y)
        return x.permute(0, 3, 2, 1).unflatten(3, size)  # (B, C, T, H, W)


class Down(nn.Module):
    """A strided convolution, plus a shortcut: cells go into the channels, in averaged groups."""
    def __init__(self, c_in, c_out, s, t):
        super().__init__()
        self.c_out = c_out
        self.s = s
        self.t = t
        self.conv = Conv(c_in, c_out, s, t)

    def shortcut(self, x):
        s, t = self.s, self.t
        if x.shape[2] % t:
            x = torch.cat([x, x[:, :, -1:]], dim=2)
        B, C, T, H, W = x.shape
        x = x.view(B, C, T // t, t, H // s, s, W // s, s)
        x = x.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4)  # (B, T/t, H/s, W/s, t s s C)
        x = x.unflatten(4, (self.c_out, -1)).mean(-1)  # (B, T/t, H/s, W/s, c_out)
        return x.movedim(-1, 1)

    def forward(self, x):
        return self.conv(x) + self.shortcut(x)


class Up(nn.Module):
    """Nearest neighbours and a convolution, plus the mirror image of Down's shortcut."""
    def __init__(self, c_in, c_out, s, t):
        super().__init__()
        self.c_out = c_out
        self.s = s
        self.t = t
        self.conv = Conv(c_in, c_out)

    def shortcut(self, x):
        s, t = self.s, self.t
        B, C, T, H, W = x.shape
        copies = self.c_out * t * s * s // C
        x = x.movedim(1, -1).repeat_interleave(copies, dim=-1)  # (B, T, H, W, t s s c_out)
        x = x.view(B, T, H, W, t, s, s, self.c_out)
        x = x.permute(0, 1, 4, 2, 5, 3, 6, 7)  # (B, T, t, H, s, W, s, c_out)
        x = x.reshape(B, T * t, H * s, W * s, self.c_out)
        return x.movedim(-1, 1)

    def forward(self, x):
        y = F.interpolate(x, scale_factor=(self.t, self.s, self.s))  # (B, c_in, t T, s H, s W)
        y = y.contiguous(memory_format=torch.channels_last_3d)  # which CUDA's 3-D kernel loses
        return self.conv(y) + self.shortcut(x)


class TAE(nn.Module):
    """Temporal autoencoder (App. C): video (B, 3, T, H, W) <-> latent (B, C, T', H', W').

    T' = ceil(T / temporal) for any T, H' = H / spatial, W' = W / spatial. ValueError for channels,
    widths and factors that do not fit together.
    """
    def __init__(self, channels, widths, blocks, spatial, temporal, tile=32):
        super().__init__()
        self.channels = channels
        self.spatial = spatial
        self.temporal = temporal
        self.tile = tile
        last = widths[-1]
        if last % channels:
            raise ValueError(f"TAE: found a last width of {last} and {channels} latent channels, "
                             "expected a multiple")
        factors = [2 ** k for k in range(len(widths))]
        if spatial not in factors or temporal not in factors:
            raise ValueError(f"TAE: found factors {spatial} in space and {temporal} in time, "
                             f"expected some of {factors} for {len(widths)} widths")
        encoder = [Conv(3, widths[0])]
        decoder = [nn.SiLU(), Conv(widths[0], 3)]
        for i in range(len(widths) - 1):
            fine, coarse = widths[i:i + 2]
            s = 2 if spatial > 2 ** i else 1
            t = 2 if temporal > 2 ** i else 1
            cell = fine * t * s * s
            if cell % coarse:
                raise ValueError(f"TAE: found widths {fine}, {coarse}, expected the second to "
                                 f"divide {cell}, a cell of the first")
            encoder += [ResBlock(fine) for _ in range(blocks[i])]
            encoder += [Down(fine, coarse, s, t)]
            decoder = [ResBlock(fine) for _ in range(blocks[i])] + decoder
            decoder = [Up(coarse, fine, s, t)] + decoder
        encoder += [ResBlock(last), PixelAttention(last), ResBlock(last)]
        decoder = [ResBlock(last), PixelAttention(last), ResBlock(last)] + decoder
        self.encoder = nn.Sequential(*encoder)
        self.to_latent = nn.Sequential(nn.SiLU(), Conv(last, 2 * channels))
        self.from_latent = Conv(channels, last)
        self.decoder = nn.Sequential(*decoder)
        # Mean and standard deviation per channel, of appearance and of motion
        self.register_buffer("statistics", torch.empty(2, 2, channels))
        self.to(memory_format=torch.channels_last)
        self.init()

    @torch.no_grad()
    def init(self):
        """Draw the first weights. The net starts as an autoencoder of single images."""
        init_layers(self)
        for module in self.modules():
            if isinstance(module, Conv):
                nn.init.dirac_(module.time.weight)  # the identity
            if isinstance(module, ResBlock):  # residual branches start at zero
                nn.init.zeros_(module.conv2.space.weight)
            if isinstance(module, PixelAttention):
                nn.init.zeros_(module.space.out.weight)
                nn.init.zeros_(module.time.out.weight)
        # Almost no noise on the latents, until the means say something
        self.to_latent[-1].time.bias[self.channels:] = -6
        self.statistics[:, 0] = 0
        self.statistics[:, 1] = 1

    def moments(self, video):
        """video -> mean and log-variance of its latent, (B, C, T', H', W') each, not normalised."""
        video = video.contiguous(memory_format=torch.channels_last_3d)
        h = self.encoder(video)  # (B, D, T', H', W')
        mean, logvar = self.to_latent(h).chunk(2, dim=1)
        shortcut = h.unflatten(1, (self.channels, -1)).mean(2)  # (B, C, T', H', W')
        return mean + shortcut, logvar.clamp(-30, 20)

    def reconstruct(self, latent):
        """Latent (B, C, T', H', W'), not normalised -> video (B, 3, temporal T', H, W)."""
        h = self.from_latent(latent)  # (B, D, T', H', W')
        copies = h.shape[1] // self.channels
        return self.decoder(h + latent.repeat_interleave(copies, dim=1))

    def encode(self, video, motion=False):
        """video -> latent with mean 0 and variance 1. Long clips are encoded tile by tile."""
        tiles = [self.moments(part)[0] for part in video.split(self.tile, dim=2)]
        mean, std = self.statistics[int(motion), :, :, None, None, None]
        return (torch.cat(tiles, dim=2) - mean) / std

    def decode(self, latent, frames, motion=False):
        """Normalised latent -> video (B, 3, frames, H, W). Tiles overlap by half, blended."""
        mean, std = self.statistics[int(motion), :, :, None, None, None]
        latent = latent * std + mean
        size = self.tile // self.temporal
        hop = size // 2
        video = self.reconstruct(latent[:, :, :size])
        for start in range(hop, latent.shape[2] - hop, hop):
            new = self.reconstruct(latent[:, :, start:start + size])
            overlap = video.shape[2] - start * self.temporal
            weight = torch.linspace(0, 1, overlap).to(video)[:, None, None]
            blend = torch.lerp(video[:, :, -overlap:], new[:, :, :overlap], weight)
            video = torch.cat([video[:, :, :-overlap], blend, new[:, :, overlap:]], dim=2)
        return video[:, :, :frames]  # without the frames that rounding up had added
