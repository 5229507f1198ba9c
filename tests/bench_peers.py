"""Speed beside the libraries that a student would otherwise use: diffusers and torchvision.

    pip install torch==2.13.0 -r requirements.txt diffusers==0.42.1     # an environment of its own
    pip download --no-deps -d wheel torchvision==0.28.0 && (cd wheel && unzip -q torchvision-*.whl)
    python tests/bench_peers.py --torchvision wheel/torchvision     # all, 20 minutes on 2 cores
    python tests/bench_peers.py dit tae --device cuda --bf16 --compile --reps 50    # some of it

Ours and the peer take turns, because machines drift; the figure is the median of the ratios, pair
by pair. Memory is the peak of a process of its own, beyond what its imports took.
"""
import argparse
import ctypes
import gc
import pathlib
import statistics
import subprocess
import sys
import time
import types

import torch

sys.path[:0] = [str(pathlib.Path(__file__).parents[1]), str(pathlib.Path(__file__).parent)]
import common
import data
import flow
import model
import record_raft
import sample


def in_turn(a, works, reps):
    """{name: the seconds of each work}, called in turn; the first two rounds do not count."""
    took = {name: [] for name in works}
    for k in range(reps + 2):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if a.device == "cuda":
                torch.cuda.synchronize()
            took[name].append(time.perf_counter() - start)
    return {name: seconds[2:] for name, seconds in took.items()}


def print_row(what, wanted, ours, theirs):
    ratios = [x / y for x, y in zip(ours, theirs)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    own, other = [f"{1000 * statistics.median(times):,.0f} ms" for times in (ours, theirs)]
    ratio = f"{middle:.2f}x [{low:.2f}, {high:.2f}]"
    print(f"| {what} | {own} | {other} | {ratio} | {wanted} |", flush=True)


def peak_memory(device, reset=False):
    """The most bytes since the last reset, on the GPU or resident in this process (Linux)."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        ctypes.CDLL(None).malloc_trim(0)        # gives back what was freed
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def print_memory(a, build):
    """Peak memory in MB that three rounds of the works of the net a.only add to this process."""
    build(a, a.only)                            # imports what it needs; its nets are dropped
    gc.collect()
    before = peak_memory(a.device, reset=True)
    for work in build(a, a.only).values():
        for _ in range(3):
            work()
    print((peak_memory(a.device) - before) / 2 ** 20)


def memory_apart(a, case, name):
    """The same in a process of its own, the median of three."""
    words = [sys.executable, __file__, case, "--only", name, "--device", a.device]
    words += ["--bf16"] * a.bf16 + ["--compile"] * a.compile
    return statistics.median(float(subprocess.check_output(words).split()[-1]) for _ in range(3))


def compare(a, case, build, wanted):
    """Time the works {what: function} of build(a, name), then compare their peaks of memory."""
    if a.only:
        return print_memory(a, build)
    works = {name: build(a, name) for name in ("ours", *wanted)}
    for what in works["ours"]:
        took = in_turn(a, {name: own[what] for name, own in works.items()}, a.reps)
        for peer, most in wanted.items():
            print_row(f"{what}, beside {peer}", f"at most {most}x", took["ours"], took[peer])
    peaks = {name: memory_apart(a, case, name) for name in works}
    peer = min(wanted, key=peaks.get)
    print(f"| {case}, peak memory, beside {peer} | {peaks['ours']:,.0f} MB | {peaks[peer]:,.0f} MB "
          f"| {peaks['ours'] / peaks[peer]:.2f}x | at most 1.05x |", flush=True)


def training_step(a, net, call):
    """Forward and backward. The loss is the mean square of what comes out."""
    net.to(a.device).train()
    for block in getattr(net, "blocks", None) or getattr(net, "transformer_blocks", []):
        if a.compile:
            block.compile()

    def step():
        net.zero_grad(set_to_none=True)
        with torch.autocast(a.device, torch.bfloat16, enabled=a.bf16):
            out = call()
        out.float().square().mean().backward()
    return step


def our_dit(a, clips, frames):
    """Latents of 16 channels, 16x16: 64 tokens a frame. Width 384, 8 blocks, 6 heads."""
    net = model.DiT(16, frames, 16, 16, 384, 8, 6, [384])
    for p in net.parameters():                  # zeros would make many gradients zero
        torch.nn.init.normal_(p, std=0.02)
    x = torch.randn(clips, 16, frames, 16, 16, device=a.device)
    t = torch.rand(clips, device=a.device)
    text = torch.randn(clips, 16, 384, device=a.device)
    mask = torch.ones(clips, 16, dtype=torch.bool, device=a.device)
    return training_step(a, net, lambda: net(x, t, text, mask))


def transformer(a, name):
    what = "DiT, forward and backward"
    if name == "ours":
        return {what: our_dit(a, 4, 8)}
    import diffusers
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    x = torch.randn(4, 16, 8, 16, 16, device=a.device)
    text = torch.randn(4, 16, 384, device=a.device)
    t = torch.randint(0, 1000, (4,), device=a.device)
    same = dict(num_layers=8, num_attention_heads=6, attention_head_dim=64,
                in_channels=16, out_channels=16)
    if name == "Wan":
        net = diffusers.WanTransformer3DModel(**same, text_dim=384, freq_dim=256, ffn_dim=1536)
        return {what: training_step(a, net, lambda: net(x, t, text).sample)}
    net = diffusers.CogVideoXTransformer3DModel(
        **same, time_embed_dim=384, text_embed_dim=384, sample_width=16, sample_height=16,
        sample_frames=29, max_text_seq_length=16, use_rotary_positional_embeddings=True)
    x = x.transpose(1, 2)
    rotary = get_3d_rotary_pos_embed(64, ((0, 0), (8, 8)), (8, 8), 8, device=a.device)
    return {what: training_step(a, net, lambda: net(x, text, t, image_rotary_emb=rotary).sample)}


def dit(a):
    compare(a, "dit", transformer, wanted={"Wan": 1.0, "CogVideoX": 1.05})


def autoencoder(a, name):
    """17 frames of 64x64; widths 32, 64, 128, 128; 8x smaller in space and 4x in time; 24 residual
    blocks. CogVideoX has causal 3-D convolutions with group norms, ours has pairs without."""
    video = torch.randn(1, 3, 17, 64, 64, device=a.device)
    widths = (32, 64, 128, 128)
    if name == "ours":
        net = model.TAE(16, widths, (3, 3, 4), spatial=8, temporal=4)

        def training():
            return net.reconstruct(net.moments(video)[0])[:, :, :17]
    else:
        import diffusers
        net = diffusers.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4, latent_channels=16,
            up_block_types=("CogVideoXUpBlock3D",) * 4, block_out_channels=widths,
            layers_per_block=2, norm_num_groups=16, temporal_compression_ratio=4,
            sample_height=64, sample_width=64)

        def training():
            return net.decode(net.encode(video).latent_dist.mode()).sample

    @torch.no_grad()
    @torch.autocast(a.device, torch.bfloat16, enabled=a.bf16)
    def codec():
        return net.decode(net.encode(video), 17) if name == "ours" else training()

    return {"TAE, encode and decode": codec, "TAE, training step": training_step(a, net, training)}


def tae(a):
    compare(a, "tae", autoencoder, wanted={"CogVideoX": 0.40})


@torch.no_grad()
def raft(a):
    """RAFT small on 12 pairs of 256x256, with the same weights. Their flows must agree first."""
    theirs = record_raft.load_torchvision(a.torchvision).raft_small(weights=None)
    theirs = record_raft.fill_(theirs).to(a.device)
    ours = flow.RAFT("small").to(a.device).eval()
    ours.load_state_dict(theirs.state_dict())
    pair = [frames.to(a.device) for frames in record_raft.frames(12, 256, 256)]
    torch.testing.assert_close(ours(*pair, 12), theirs(*pair, 12)[-1], rtol=0, atol=0.01)
    took = in_turn(a, dict(ours=lambda: ours(*pair, 12), theirs=lambda: theirs(*pair, 12)), a.reps)
    print_row("RAFT small, beside torchvision", "at most 1.05x", **took)


def guidance(a):
    """100 steps of Inner-Guidance (Eq. 8, 250 branches) beside text guidance alone (200)."""
    config = common.load_config(["preset=tiny", "run=runs/none"])
    device = torch.device(a.device)
    nets = common.build_nets(config, device, motion=True).eval()
    for part in nets.values():
        part.init()
    net = types.SimpleNamespace(config=config, motion=True, device=device, **nets)

    def work(kind):
        s = sample.settings(net, steps=100, guidance=kind)
        list(sample.sampler(net, data.PROMPTS[:8], range(8), s))
    took = in_turn(a, dict(ours=lambda: work("inner"), theirs=lambda: work("text")), a.reps)
    print_row("Inner-Guidance, beside text guidance", "at most 1.28x", **took)


def main():
    cases = dict(dit=dit, tae=tae, raft=raft, guidance=guidance)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=cases, metavar="case", help=" ".join(cases))
    parser.add_argument("--torchvision", default="wheel/torchvision", help="its folder")
    parser.add_argument("--reps", type=int, default=10)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--bf16", action="store_true", help="autocast, ours and theirs")
    parser.add_argument("--compile", action="store_true", help="blocks of the DiTs")
    parser.add_argument("--only", help="print the peak memory of one net, in MB")
    a = parser.parse_args()
    torch.manual_seed(0)
    print(f"{a.device}, {torch.get_num_threads()} CPU threads, bf16 {a.bf16}\n\n"
          "| what | ours | beside | ratio [quartiles] | wanted |\n|---|---|---|---|---|")
    for case in a.cases:
        cases[case](a)


if __name__ == "__main__":
    main()
