"""Speed, side by side with the libraries that a student would otherwise use: diffusers' video nets and torchvision's RAFT.

    pip install torch==2.13.0 -r requirements.txt diffusers==0.42.1      # in an environment of its own: no dependency of the project
    pip download --no-deps -d wheel torchvision==0.28.0 && (cd wheel && unzip -q torchvision-*.whl)
    python tests/bench_peers.py --torchvision wheel/torchvision          # everything, about 20 minutes on 2 cores
    python tests/bench_peers.py dit                                      # one of: dit tae raft guidance data long growth map
    python tests/bench_peers.py dit tae --device cuda --dtype bfloat16 --compile --reps 50

Ours and the peer take turns in one process, and the figure is the median of the ratios pair by pair, because machines drift. Memory is
the peak of a process of its own, less what was resident after the imports. No pytest: it needs a quiet machine and packages beyond ours.
Letters: B clips, T frames, H height, W width, N tokens, D width.
"""
import argparse
import gc
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import types

import torch

sys.path[:0] = [str(pathlib.Path(__file__).parents[1]), str(pathlib.Path(__file__).parent)]
import data  # noqa: E402
import flow  # noqa: E402
import model as nets  # noqa: E402
import probe  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402


# ---------------------------------------------------------------------------------------------------------------------
# Timing.

def alternate(a, works, reps):
    """Seconds of each work, called in turn `reps` times after two rounds that do not count: {name: [seconds]}."""
    took = {name: [] for name in works}
    for k in range(reps + 2):
        for name, work in works.items():
            seconds = probe.timed(torch.device(a.device), work)
            if k >= 2:
                took[name].append(seconds)
    return took


def row(what, target, ours, theirs, extra=""):
    """A line of the table: the median of the ratios pair by pair, their quartiles, and how many pairs."""
    ratios = [x / y for x, y in zip(ours, theirs)]
    low, _, high = statistics.quantiles(ratios, n=4)
    ms = lambda seconds: f"{1e3 * statistics.median(seconds):,.0f} ms"
    show = lambda x: f"{x:.2f}" if x >= 0.1 else f"{x:.3f}"
    print(f"| {what} | {ms(ours)} | {ms(theirs)} | **{show(statistics.median(ratios))}x** [{show(low)}, {show(high)}], {len(ratios)} pairs | {target} |{extra}", flush=True)


def megabytes(a, case, name):
    """Peak memory that one work adds in a process of its own, the median of three: what the allocator leaves in holes differs from run to run."""
    words = [sys.executable, __file__, case, "--only", name, "--device", a.device, "--dtype", a.dtype, "--threads", str(a.threads)]
    found = []
    for _ in range(3):
        got = subprocess.run(words + ["--compile"] * a.compile, capture_output=True, text=True)
        if got.returncode:
            raise SystemExit(got.stderr)
        found.append(float(got.stdout.splitlines()[-1]))
    return statistics.median(found)


def compare(a, case, build, peers):
    """Build ours and the peers' works, time them in turn, print a line for each pair of (work, peer, target), and one of memory."""
    if a.only:                                                                  # in a process of its own: what does this one add?
        device = torch.device(a.device)
        build(a, a.only)                                                        # imports whatever it needs; the nets go again
        gc.collect()
        before = probe.peak_memory(device, reset=True)
        for work in build(a, a.only).values():
            for _ in range(3):
                work()
        return print((probe.peak_memory(device) - before) / 2 ** 20)
    works = {name: build(a, name) for name in ("ours", *peers)}
    for what in works["ours"]:
        took = alternate(a, {name: own[what] for name, own in works.items()}, a.reps)
        for peer, targets in peers.items():
            row(f"{what}, against {peer}", targets[what], took["ours"], took[peer])
    peak = {name: megabytes(a, case, name) for name in works}
    lightest = min(peers, key=peak.get)
    target = peers[lightest]["memory"]
    print(f"| {case}, peak memory, against {lightest} | {peak['ours']:,.0f} MB | {peak[lightest]:,.0f} MB | **{peak['ours'] / peak[lightest]:.2f}x** | {target} |")


# ---------------------------------------------------------------------------------------------------------------------
# The video transformers: latents of 16 channels, 8 x 16 x 16, patches 1x2x2, so 512 tokens; D = 384, 8 blocks, 6 heads, 16 text tokens.

def transformer(a, name):
    """One net, forward and backward, as {what: work}. Every net is drawn by its own library; the loss is the mean square of what comes out."""
    dtype, D, depth, heads, text = getattr(torch, a.dtype), 384, 8, 6, 16
    x, words = torch.randn(4, 16, 8, 16, 16, device=a.device, dtype=dtype), torch.randn(4, text, D, device=a.device, dtype=dtype)
    if name == "ours":
        net, t, mask = nets.DiT(16, 8, 16, 16, D, depth, heads, 1024, [D]), torch.rand(4, device=a.device), torch.ones(4, text, dtype=torch.bool, device=a.device)
        call = lambda: net(x, t, words, mask)
        for p in net.parameters():                                              # its zeros would make gradients zero: no cheaper, but less like work
            torch.nn.init.normal_(p, std=0.02)
    else:
        import diffusers
        t = torch.randint(0, 1000, (4,), device=a.device)
        if name == "WanTransformer3DModel":
            net = diffusers.WanTransformer3DModel(num_attention_heads=heads, attention_head_dim=D // heads, in_channels=16, out_channels=16, text_dim=D,
                                                  freq_dim=256, ffn_dim=4 * D, num_layers=depth)
            call = lambda: net(x, t, words).sample
        else:
            from diffusers.models.embeddings import get_3d_rotary_pos_embed
            net = diffusers.CogVideoXTransformer3DModel(num_attention_heads=heads, attention_head_dim=D // heads, in_channels=16, out_channels=16, time_embed_dim=D,
                                                        text_embed_dim=D, num_layers=depth, sample_width=16, sample_height=16, sample_frames=29,
                                                        max_text_seq_length=text, use_rotary_positional_embeddings=True)
            rotary = get_3d_rotary_pos_embed(D // heads, ((0, 0), (8, 8)), (8, 8), 8, device=a.device)
            call = lambda: net(x.transpose(1, 2), words, t, image_rotary_emb=rotary).sample
    net = net.to(a.device, dtype).train()
    if a.compile:
        for block in net.blocks if hasattr(net, "blocks") else net.transformer_blocks:
            block.compile()

    def step():
        net.zero_grad(set_to_none=True)
        call().float().square().mean().backward()
    return {"DiT, forward + backward": step}


def dit(a):
    targets = lambda time: {"DiT, forward + backward": time, "memory": "at most 0.85x"}
    compare(a, "dit", transformer, {"WanTransformer3DModel": targets("at most 0.88x, goal 0.80x"), "CogVideoXTransformer3DModel": targets("at most 1.0x, goal 0.92x")})


# ---------------------------------------------------------------------------------------------------------------------
# The video autoencoders: 17 frames of 64x64, widths 32 64 128 128, 8x smaller in space and 4x in time, 24 residual blocks in all.
# CogVideoX's convolutions are causal 3-D ones with group norms; ours are 2-D ones, each followed by a 1-D one over time (Movie Gen), without norms.
# Its blocks lie at all four levels and in the middle (10 down, 14 up); ours at the three finer ones and in the middle (12, 12). As each library runs it:
# CogVideoX takes its frames in groups; ours is channels-last, as train.py has it.

def autoencoder(a, name):
    dtype, widths = getattr(torch, a.dtype), (32, 64, 128, 128)
    video = torch.randn(1, 3, 17, 64, 64, device=a.device, dtype=dtype)
    if name == "ours":
        net = nets.TAE(16, widths, (3, 3, 4), spatial=8, temporal=4).to(a.device, dtype, memory_format=torch.channels_last)
        there_and_back = lambda: net.decode(net.encode(video), 17)
        training = lambda: net.reconstruct(net.moments(video)[0])[:, :, :17]
    else:
        import diffusers
        net = diffusers.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4, block_out_channels=widths, latent_channels=16,
            layers_per_block=2, norm_num_groups=16, temporal_compression_ratio=4, sample_height=64, sample_width=64).to(a.device, dtype)
        there_and_back = training = lambda: net.decode(net.encode(video).latent_dist.mode()).sample
    if a.compile:
        net.encoder.compile(), net.decoder.compile()

    def step():
        net.zero_grad(set_to_none=True)
        training().float().square().mean().backward()
    return {"TAE, encode + decode": torch.no_grad()(there_and_back), "TAE, training step": step}


def tae(a):
    compare(a, "tae", autoencoder, {"AutoencoderKLCogVideoX": {what: "at most 0.60x" for what in ("TAE, encode + decode", "TAE, training step")} | {"memory": ""}})


# ---------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def raft(a):
    """RAFT small on 12 pairs of 256x256, ours against torchvision's, with the same weights: their flows must agree first."""
    import record_raft
    peer = record_raft.load_torchvision(a.torchvision)
    if peer is None:
        raise SystemExit("raft: found no torchvision that imports, expected one, or --torchvision with its unpacked folder")
    theirs, ours = record_raft.fill_(peer.raft_small(weights=None)).to(a.device), flow.RAFT("small").to(a.device).eval()
    ours.load_state_dict(theirs.state_dict())
    one, two = (frame.to(a.device) for frame in record_raft.frames(12, 256, 256))
    gap = (ours(one, two, 12) - theirs(one, two, num_flow_updates=12)[-1]).abs().max().item()
    if not gap < 0.01:
        raise SystemExit(f"raft: the two flows differ by {gap} px, expected less than 0.01: they are not the same net")
    took = alternate(a, {"ours": lambda: ours(one, two, 12), "torchvision": lambda: theirs(one, two, num_flow_updates=12)}, max(3, a.reps // 2))
    row("RAFT small, 12 pairs of 256x256, against torchvision", "at most 1.05x", took["ours"], took["torchvision"], f" (their flows differ by at most {gap:.1e} px)")


def tiny(a, *overrides):
    """A model of the `tiny` preset with first weights, as sample.py would load it: speed does not depend on what they learned."""
    config = nets.load_config(overrides)
    parts = [net.to(a.device).eval().requires_grad_(False) for net in (nets.build_tae(config), nets.build_text(config), nets.build_dit(config, motion=True))]
    return types.SimpleNamespace(config=config, tae=parts[0], text=parts[1], dit=parts[2], motion=True, device=torch.device(a.device))


def guidance(a):
    """100 steps with Inner-Guidance (Eq. 8: 250 branches) against text guidance alone (200 branches)."""
    for overrides in ([], ["preset=small", "batch=1"]):
        model, prompts = tiny(a, *overrides), data.STRAIGHT[:8 if not overrides else 1]
        work = lambda kind: lambda: list(sample.sampler(model, prompts, list(range(len(prompts))), steps=100, guidance=kind))
        took = alternate(a, {kind: work(kind) for kind in ("inner", "text")}, 3 if overrides else a.reps)
        row(f"Inner-Guidance, 100 steps, {len(prompts)} clips of {model.config['preset']}, against text guidance", "at most 1.25x + 3 %", took["inner"], took["text"])


def data_(a):
    """Rendering a batch of the world's clips, as a share of the joint net's step that renders, encodes and trains on them (`map` has the TAE's step)."""
    for preset in ("tiny", "small"):
        config = nets.load_config([f"preset={preset}", "precision=fp32", "run=no-such-run"] + ["batch=16"] * (preset == "small"))
        device, world = torch.device(a.device), data.open_data(config)
        parts = train.build_sharded(config, device, motion=True)
        net = nets.build_tae(config).to(device, memory_format=torch.channels_last)
        latents = data.Latents(dict(config, data=dict(root="", cache=0)), net, world, device, bar=False)
        state, loss = train.prepare(config, parts, 1e-4), train.dit_loss(config, parts, True, latents, 0, device)
        micro = train.micro_batches(config, config["batch"])

        def step():
            train.gradient(config, state, loss, 0, micro, config["batch"])
            train.update(config, state, 0, 1e-4)
        took = alternate(a, {"data": lambda: world.batch(range(config["batch"]), device), "step": step}, max(3, a.reps // 2) if preset == "small" else 4 * a.reps)
        row(f"{preset}: rendering {config['batch']} clips, of the step that renders, encodes and trains", "under 0.05x", took["data"], took["step"])


# ---------------------------------------------------------------------------------------------------------------------

def frames_in_memory(a, preset, frames):
    """Peak memory in GB of encoding and decoding `frames` frames of 256x256 in a process of its own, beyond the two videos themselves."""
    code = (f"import sys; sys.path.insert(0, {sys.path[0]!r}); import torch, model, probe; torch.set_num_threads({a.threads}); device = torch.device({a.device!r})\n"
            f"tae = model.build_tae(model.load_config(['preset={preset}'])).to(device, memory_format=torch.channels_last).requires_grad_(False)\n"
            f"video = torch.rand(1, 3, {frames}, 256, 256, device=device); before = probe.peak_memory(device, reset=True)\n"
            f"with torch.no_grad(): again = tae.decode(tae.encode(video), {frames})\n"
            f"print((probe.peak_memory(device) - before - again.nbytes) / 1e9)")
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if got.returncode:
        raise SystemExit(got.stderr)
    return float(got.stdout)


def long(a):
    """Tiles: memory of the TAE for 32, 64 and 128 frames of 256x256."""
    for preset, frames in (("small", (32, 64, 128)), ("4b", (32,))):
        gb = ", ".join(f"{frames_in_memory(a, preset, n):.1f}" for n in frames)
        print(f"| TAE of `{preset}`, encode + decode {', '.join(map(str, frames))} frames of 256x256 | {gb} GB | | | the same for all, under 8 GB |", flush=True)


def growth(a):
    """Forward and backward of the DiT above with 512 to 4,096 tokens: the exponent, and what attention (N²) and the rest (N) have in it."""
    tokens, took = (512, 1024, 2048, 4096), []
    for N in tokens:
        net = nets.DiT(16, N // 64, 16, 16, 384, 8, 6, 1024, [384]).to(a.device)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.02)
        x, t = torch.randn(1, 16, N // 64, 16, 16, device=a.device), torch.rand(1, device=a.device)
        words, mask = torch.randn(1, 16, 384, device=a.device), torch.ones(1, 16, dtype=torch.bool, device=a.device)
        seconds = [probe.timed(torch.device(a.device), lambda: net(x, t, words, mask).square().mean().backward()) for _ in range(5)]
        took.append(statistics.median(seconds[2:]))
    n, s = torch.tensor(tokens).double(), torch.tensor(took).double()
    line = torch.stack([n.log(), torch.ones(4).double()], 1)
    exponent = torch.linalg.lstsq(line, s.log()[:, None]).solution[0].item()
    linear, square = torch.linalg.lstsq(torch.stack([n, n ** 2], 1) / s[:, None], torch.ones(4, 1).double()).solution.flatten().tolist()
    print(f"| growth, {', '.join(map(str, tokens))} tokens | {', '.join(f'{1e3 * x:,.0f}' for x in took)} ms | | exponent **{exponent:.2f}** | |")
    print("  seconds = a N + b N²; b N², attention's share: " + ", ".join(f"{100 * square * N / (linear + square * N):.0f} % at {N}" for N in tokens))


PARTS = [(data.MovingShapes, "batch", "rendering clips"), (train, "draw", "noise, t and drops"), (nets.ByteText, "forward", "text encoder, forward"),
         (nets.DiT, "forward", "DiT, forward"), (nets.TAE, "moments", "TAE, forward"), (nets.TAE, "reconstruct", "TAE, forward"), (torch.Tensor, "backward", "backward"),
         (torch.nn.utils, "clip_grad_norm_", "AdamW, EMA, clipping"), (train, "update", "AdamW, EMA, clipping")]


def map_(a, steps=60):
    """Where the time of the default run's steps goes: PARTS are timed from outside while train.py takes `steps` steps of each stage. CPU only."""
    if a.device != "cpu":
        raise SystemExit(f"map: found device {a.device}, expected cpu: a GPU works on while the clock of the next part runs")
    took, inside, fit = {}, [], train.fit

    def stopwatch(owner, name, what):                                           # counts what is its own, not what it calls
        original = getattr(owner, name)

        def timed(*args, **kwargs):
            start = time.perf_counter()
            inside.append(0.0)
            try:
                return original(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - start
                took[what] = took.get(what, 0) + seconds - inside.pop()
                if inside:
                    inside[-1] += seconds
        setattr(owner, name, timed)

    def fit_and_report(config, stage, *args, **kwargs):
        took.clear()
        seconds = probe.timed(torch.device(a.device), lambda: got.append(fit(config, stage, *args, **kwargs)))
        rest = {**took, "the rest: loss, logs, bar, checkpoint": seconds - sum(took.values())}
        print(f"\n{stage}, {1e3 * seconds / steps:.0f} ms a step: " + ", ".join(f"{what} {100 * s / seconds:.1f} %" for what, s in sorted(rest.items(), key=lambda r: -r[1])))
        return got.pop()

    torch.optim.AdamW([torch.zeros(1)])                                         # the first one imports torch's compiler: a second that is no step's
    got, train.fit = [], fit_and_report
    for part in PARTS:
        stopwatch(*part)
    with tempfile.TemporaryDirectory() as folder:
        train.main([f"run={folder}/run", f"device={a.device}", "data.cache=256", "save_every=1000", *(f"{stage}.steps={steps}" for stage in ("tae", "base", "videojam"))])


# ---------------------------------------------------------------------------------------------------------------------

CASES = dict(dit=dit, tae=tae, raft=raft, guidance=guidance, data=data_, long=long, growth=growth, map=map_)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("cases", nargs="*", help=f"some of {', '.join(CASES)}; none: all")
    p.add_argument("--torchvision", help="torchvision's unpacked folder, where it does not import beside this torch")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--reps", type=int, default=10)
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    p.add_argument("--compile", action="store_true", help="compile blocks, ours and theirs")
    p.add_argument("--only", help=argparse.SUPPRESS)
    a = p.parse_args()
    if unknown := [case for case in a.cases if case not in CASES]:
        sys.exit(f"bench_peers.py: found {', '.join(unknown)}, expected some of {', '.join(CASES)}")
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    if not a.only:
        where = torch.cuda.get_device_name() if a.device == "cuda" else f"{a.threads} CPU threads"
        print(f"torch {torch.__version__}, {where}, {a.dtype}, median of the ratios, [their quartiles]\n")
        print("| what | ours | theirs | ratio | target |\n|---|---|---|---|---|")
    for case in a.cases or CASES:
        CASES[case](a)


if __name__ == "__main__":
    main()
