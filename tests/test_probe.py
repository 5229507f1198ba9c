"""probe.py: the experiments. References: the paper's tables, stub models whose answer is known,
the experiments written out plainly, and what torch counts and allocates itself."""
import csv
import json
import types

import numpy as np
import pytest
import torch

import common
import data
import flow
import metrics
import model
import probe
import sample
from conftest import TINY

SCORES = ("aesthetic", "imaging", "subject", "background", "smoothness", "dynamic")
BREAKDOWN = {       # Tabs. 4, 5, 7 in the order of SCORES, then Tabs. 1, 2, 6: appearance, motion
    "Tab. 4 CogVideo2B": ((46.9, 48.9, 87.8, 93.9, 97.1, 88.6), (68.3, 90.0)),
    "Tab. 4 CogVideo5B": ((51.1, 52.9, 91.3, 95.3, 97.3, 87.5), (71.9, 90.1)),
    "Tab. 4 DiT-4B": ((51.8, 61.4, 93.0, 96.7, 99.3, 38.3), (75.2, 78.3)),
    "Tab. 4 VideoJAM-4B": ((51.6, 61.1, 93.5, 96.7, 98.8, 87.5), (75.1, 93.7)),
    "Tab. 5 CogVideo5B": ((51.1, 52.9, 91.3, 95.3, 97.3, 87.5), (71.9, 90.1)),
    "Tab. 5 Gen3": ((55.1, 55.1, 90.7, 95.2, 98.4, 84.4), (73.2, 92.0)),
    "Tab. 5 Mochi": ((49.5, 48.8, 89.7, 95.2, 98.4, 78.1), (69.9, 89.7)),
    "Tab. 5 Sora": ((56.8, 57.7, 93.0, 96.4, 98.7, 82.0), (75.4, 91.7)),
    "Tab. 5 Kling 1.5": ((58.5, 60.4, 93.9, 96.5, 99.2, 64.8), (76.8, 87.1)),
    "Tab. 5 DiT-30B": ((49.2, 56.8, 91.3, 95.5, 98.8, 71.1), (72.4, 88.1)),
    "Tab. 5 VideoJAM-30B": ((51.2, 55.9, 93.0, 96.1, 99.0, 82.3), (73.4, 92.4)),
    "Tab. 7 CogVideo5B": ((50.9, 51.9, 89.5, 94.7, 97.5, 81.6), (70.8, 88.8)),
    "Tab. 7 Mochi": ((50.4, 50.1, 89.0, 95.4, 98.9, 60.7), (70.4, 85.1)),
    "Tab. 7 DiT-30B": ((48.7, 50.6, 90.8, 95.3, 98.9, 67.8), (70.5, 87.3)),
    "Tab. 7 VideoJAM-30B": ((51.5, 56.4, 93.3, 96.2, 99.1, 76.9), (73.7, 90.8)),
}


def test_vbench_aggregate():
    """App. C.1, every row of the paper's breakdowns against its main tables. 0.15: the inputs are
    rounded to 0.1; Gen3's motion alone is off by 0.3 in the paper."""
    for row, (scores, (appearance, motion)) in BREAKDOWN.items():
        got = probe.vbench_aggregate(**dict(zip(SCORES, scores)))
        assert got[0] == pytest.approx(appearance, abs=0.15), row
        assert got[1] == pytest.approx(motion, abs=0.35 if "Gen3" in row else 0.15), row


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    """A copy of the trained run, to write into."""
    path = tmp_path_factory.mktemp("probe") / "run"
    path.mkdir()
    for file in trained[0].iterdir():
        if file.suffix in (".pt", ".json") and file.is_file():
            (path / file.name).write_bytes(file.read_bytes())
    return path


def probe_main(run, *arguments):
    """python probe.py -> nothing; what it wrote is read below."""
    probe.main([*map(str, arguments), "--run", str(run)])


def table(run, name):
    with open(run / "probe" / f"{name}.csv") as file:
        return list(csv.DictReader(file))


# ---- The report


def test_train_ends_with_the_report(trained):
    """The table of train.py: every row, every column, the files. Reference: the issue's list."""
    run, out = trained
    assert all(column in out for column in probe.REPORT.values())
    numbers = json.loads((run / "report.json").read_text())
    for row in ("ground truth", "through the TAE", "base", "control", "videojam"):
        assert f"\n{row} " in out and set(numbers[row]) == {*probe.REPORT, "picture"}
    assert numbers["ground truth"]["direction"][0] == 1
    assert (run / "report.png").exists() and "direction right in the motion pictures" in out
    assert f"TAE: {numbers['tae_psnr_db']:.1f} dB" in out


def test_report_against_a_plain_loop(run):
    """Other prompts, seed, settings and name. Reference: sampling and reading written out."""
    probe_main(run, "report", "--split", "val", "--seed", 3, "--count", 6, "--stages", "videojam",
               "--w-text", 1, "--w-motion", 0.5, "--out", "other")
    numbers = json.loads((run / "other.json").read_text())
    prompts = data.straight_prompts("val", 6)
    assert not set(prompts) & set(data.STRAIGHT)
    model = common.load_run(run)
    s = sample.settings(model, w_text=1.0, w_motion=0.5)
    videos, motion = sample.generate(model, prompts, range(3, 9), s)
    colour = [metrics.dominant_color(v) == data.parse(p)["objects"][0]["color"]
              for v, p in zip(videos, prompts)]
    assert numbers["videojam"]["colour"][0] == pytest.approx(np.mean(colour))
    low, high = metrics.wilson(sum(colour), 6)
    assert numbers["videojam"]["colour"][1:] == pytest.approx([low, high])
    truth = data.open_data(model.config, "val").of_prompts(prompts)["video"]
    again = model.tae.decode(model.tae.encode(truth), 8).clamp(-1, 1)
    assert numbers["tae_psnr_db"] == pytest.approx(metrics.psnr(truth, again), abs=0.01)
    assert "base" not in numbers and (run / "other.png").exists()


# ---- Fig. 3


def test_shuffled_clips_have_their_own_flow():
    """Frame k of a shuffled clip is carried to frame k+1 by its flow. References: data's flow of
    one pair of frames; with frames in order nothing changes."""
    batch = data.MovingShapes(6, 16, 16, split="test").batch([0, 1])
    orders = torch.tensor([[3, 0, 5, 1, 4, 2], [0, 1, 2, 3, 4, 5]])
    got = probe.shuffle_frames(batch, orders)
    assert torch.equal(got["video"][0], batch["video"][0][:, orders[0]])
    torch.testing.assert_close(got["video"][1], batch["video"][1])
    torch.testing.assert_close(got["flow"][1], batch["flow"][1], atol=1e-4, rtol=0)
    one = data.flow_between(batch["spec"][:1], [5], [1], 16, 16)[0, :, 0]
    torch.testing.assert_close(got["flow"][0][:, 2], one, atol=1e-4, rtol=0)


def test_permute_with_a_known_ratio(run, monkeypatch):
    """A net that always says 0, on latents that are 2 everywhere, or 3 if shuffled: its losses are
    E (z1 - z0)² = 5 and 10. 8 %: z0 is drawn. The ratio's interval is that of pairs, so narrow."""
    config = common.load_run(run).config
    stub = types.SimpleNamespace(config=config, motion=False, tae=None,
                                 device=torch.device("cpu"),
                                 dit=lambda z, t, *text: 0 * z, text=lambda captions: ())

    def encode(config, tae, batch):
        return torch.full((len(batch["video"]), 8, 2, 4, 4), 2.0 if "caption" in batch else 3.0)

    monkeypatch.setattr(probe, "load_models", lambda *a: ({"base": stub}, config))
    monkeypatch.setattr(data, "encode", encode)
    probe_main(run, "permute", "--count", 12)
    rows = table(run, "permute")
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 3]
    for row in rows:
        ratio, low, high = [float(row[key]) for key in ("ratio", "low", "high")]
        assert float(row["clean"]) == pytest.approx(5, rel=0.08)
        assert ratio == pytest.approx(2, rel=0.08) and low < ratio < high < low + 0.15


def test_permute_against_a_plain_loop(run):
    """One clip, VideoJAM, one step. Reference: encode, shuffle, noise, compare, written out."""
    probe_main(run, "permute", "--count", 1)
    row = next(row for row in table(run, "permute") if row["stage"] == "videojam"
               and row["step"] == "3")
    model = common.load_run(run)
    batch = data.open_data(model.config, "test").batch([0])
    g = common.generator(0, "permute", 0)
    order = torch.randperm(8, generator=g)
    noise = torch.randn(1, 8, 2, 4, 4, generator=g)
    after = [*order[1:].tolist(), order[-1].item() + 1]
    moved = [data.flow_between(batch["spec"], [i], [j], 16, 16)
             for i, j in zip(order.tolist(), after)]
    clips = {"clean": (batch["video"], batch["flow"]),
             "shuffled": (batch["video"][:, :, order], torch.cat(moved, dim=2))}
    t = float(row["t"])
    for name, (video, d) in clips.items():
        x1 = model.tae.encode(video)
        d1 = model.tae.encode(flow.flow_to_rgb(d, 0.1), motion=True)
        z1 = torch.cat([x1, d1], dim=1)
        u = model.dit(t * z1 + (1 - t) * noise, torch.tensor([t]), *model.text(batch["caption"]))
        error = (u - (z1 - noise))[:, :4].square().mean()
        assert float(row[name]) == pytest.approx(error.item(), rel=1e-3)


# ---- Fig. 8


def test_sdedit(run):
    """From the last step nothing is noised: the source through the TAE. From step 0 nothing is
    left: the clip that the same noise gives without a source. References: these two, made here."""
    probe_main(run, "sdedit", "--count", 3)
    rows = table(run, "sdedit")
    assert [int(row["step"]) for row in rows] == 3 * [0, 1, 2, 3, 4]
    for stage in ("base", "videojam"):
        model = common.load_run(run, stage)
        batch = data.open_data(model.config, "test").batch(range(3))
        ends = {"0": sample.generate(model, batch["caption"], range(3))[0],
                "4": model.tae.decode(model.tae.encode(batch["video"]), 8).clamp(-1, 1)}
        for row in rows:
            if row["stage"] == stage and row["step"] in ends:
                psnr = metrics.psnr(ends[row["step"]], batch["video"])
                assert float(row["psnr_db"]) == pytest.approx(psnr, abs=0.01)
    assert (run / "probe" / "sdedit-sheet.png").exists()


def test_sdedit_hides_the_motion(run, monkeypatch):
    """VideoJAM's d is noise alone, (1 - t) z0, at every step. Reference: what the sampler gets."""
    seen = []

    def sampler(model, prompts, seeds, start, z):
        seen.append((model.motion, start, z))
        yield start, 0.0, z

    monkeypatch.setattr(sample, "sampler", sampler)
    probe_main(run, "sdedit", "--count", 2)
    model = common.load_run(run)
    z0 = sample.noise(model, range(2))
    times = sample.schedule(model.config.sample)
    for motion, k, z in seen:
        if motion:
            torch.testing.assert_close(z[:, 4:], (1 - times[k]) * z0[:, 4:])


# ---- Tabs. 1 and 3


def test_ablate(run, capsys):
    """All variants on the same prompts and noise. References: the paper's list, and the means and
    paired differences computed here from the rows of the clips."""
    probe_main(run, "ablate", "--count", 8)
    clips = table(run, "ablate")
    by_variant = {}
    for row in clips:
        by_variant.setdefault(row["variant"], []).append(row)
    assert list(by_variant) == ["ground truth", "through the TAE", *probe.VARIANTS]
    assert all(len(rows) == 8 for rows in by_variant.values())
    assert {row["prompt"] for row in clips} == set(data.PROMPTS[::16])
    rough = {name: np.array([float(r["roughness"]) for r in rows])
             for name, rows in by_variant.items()}
    whole, _, less = capsys.readouterr().out.partition("VideoJAM less each")
    for part, mean in ((whole, f" {np.nanmean(rough['base']):.2f} ["),
                       (less, f" {np.nanmean(rough['VideoJAM'] - rough['base']):+.2f} [")):
        assert mean in next(line for line in part.splitlines() if line.startswith("base"))


def test_groups():
    """Thirds by the true object's area, and kinds. Reference: counted by hand."""
    prompts = ["a red square falling", "a red circle moving up", "a red cross growing"]
    groups = probe.groups_of(prompts, [dict(area=0.3), dict(area=0.1), dict(area=0.2)])
    assert {name: list(members) for name, members in groups.items()} == {
        "basic": [1], "complex": [2], "rotational": [], "physics": [0],
        "small": [1], "medium": [2], "large": [0]}


# ---- plan and speed


@pytest.mark.parametrize("preset, D, hidden, depth", [("4b", 3072, 8192, 32),
                                                      ("30b", 6144, 16384, 48)])
def test_parameters_of_the_large_presets(preset, D, hidden, depth):
    """Reference: a block's 8 D² in two attentions and 3 D hidden in SwiGLU, 7 D² that all blocks
    share. 1 %: text, positions, patches."""
    with torch.device("meta"):
        dit = common.build_dit(common.load_config([f"preset={preset}"]), motion=True)
    expected = depth * (8 * D * D + 3 * D * hidden) + 7 * D * D
    assert probe.parameters(dit) == pytest.approx(expected, rel=0.01)


def test_plan(capsys):
    """A line for each stage of 4b on the paper's 32 GPUs. References: an A100 has 312 of an H100's
    989 TFLOP/s, hours are steps times seconds; 6 FLOPs for each of a block's weights and tokens,
    and attention; the TAE's step alone on a tile takes 20 to 30 GB."""
    probe.main(["plan", "preset=4b", "gpus=32", "utilisation=0.5"])
    out = capsys.readouterr().out
    assert "4,900.909 M parameters" in out
    lines = [line.split() for line in out.splitlines()[-4:]]
    assert [line[0] for line in lines] == ["tae", "encoding", "base", "videojam"]
    for name, steps, *numbers in lines:
        flops, h100, a100, hours, hours_a100, size = [float(n.replace(",", "")) for n in numbers]
        assert h100 == pytest.approx(flops / (32 * 989 * 0.5), rel=0.01)
        assert a100 / h100 == pytest.approx(989 / 312, rel=0.01)
        assert hours == pytest.approx(int(steps) * h100 / 3600, rel=0.02)
        assert hours_a100 == pytest.approx(int(steps) * a100 / 3600, rel=0.02)
        low, high = dict(tae=(20, 30), encoding=(2, 5)).get(name, (7, 8))
        assert low < size < high
    probe.main(["plan", "preset=tiny", "tflops=100"])
    assert "s, 100 TFLOP/s  hours, 100 TFLOP/s  GB per GPU" in capsys.readouterr().out
    attention = 32 * 4 * 4096 * (4096 + 256) * 3072
    assert flops == pytest.approx(3 * 32 * (2 * 4.23e9 * 4096 + attention) / 1e12, rel=0.05)


@pytest.mark.parametrize("motion", [False, True])
def test_flops_against_a_formula(motion):
    """A product of (N, a) and (a, b) is 2 N a b; attention 4 N L D. Reference: added by hand."""
    config = common.load_config(["preset=small"])
    C, T, H, W = common.latent_size(config)
    D, p, L = config.dit.dim, config.dit.patch, config.text.length
    N, h, d = T * H * W // p ** 2, 64 * round(D * 8 / 3 / 64), config.text.dim
    block = 2 * N * (6 * D * D + 3 * D * h) + 4 * L * D * D + 4 * N * (N + L) * D
    patches = (2 if motion else 1) * 4 * N * D * C * p ** 2
    around = 2 * L * d * D + 2 * (256 * D + D * D + 6 * D * D)
    text = config.text.depth * (2 * L * 10 * d * d + 4 * L * L * d)
    expected = config.dit.depth * block + patches + around + text
    assert probe.forward_flops(config, motion) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("bf16", [False, True])
def test_planned_activations_against_autograd(bf16):
    """What autograd really keeps, weights and their copies left out; 10 %."""
    config = common.load_config(["preset=small", "batch=3", "dit.depth=4", "run=runs/none",
                                 f"precision={'bf16' if bf16 else 'fp32'}"])
    text, dit = common.build_text(config), common.build_dit(config, motion=True)
    weights = {p.numel() for net in (text, dit) for p in net.parameters()}
    C, *size = dit.size
    kept = {}

    def pack(tensor):
        if tensor.numel() not in weights:               # three clips: no activation has their size
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            dit(torch.randn(3, 2 * C, *size), torch.rand(3), *text(["x" * 95] * 3))
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert probe.dit_memory(config, 1)["activations"] == pytest.approx(total, rel=0.1)


def test_planned_memory():
    """Weights, gradients, two of AdamW and the average: 20 bytes a parameter, over all GPUs; the
    micro-batch and checkpointing bound the activations. Reference: the nets' own parameters."""
    def planned(*arguments, gpus=1):
        return probe.dit_memory(common.load_config(["preset=small", *arguments]), gpus)

    config = common.load_config(["preset=small"])
    nets = common.build_text(config), common.build_dit(config, motion=True)
    whole = 4 * sum(p.numel() for net in nets for p in net.parameters())
    alone, eight = planned(), planned(gpus=8)
    state = [alone[key] for key in ("weights", "gradients", "AdamW", "averaged weights")]
    assert sum(state) == 5 * whole and alone["copies"] == whole / 2     # in bf16
    assert eight["weights"] == whole / 8 and eight["activations"] == alone["activations"] / 8
    assert planned("micro_batch=32")["activations"] == alone["activations"] / 4
    assert planned("checkpointing=true")["activations"] < 0.3 * alone["activations"]
    one = planned("checkpointing=true", "dit.depth=1")["activations"]   # its input, and all of it
    assert one == planned("dit.depth=1")["activations"] + 128 * 64 * 4 * 512


def test_speed(tmp_path):
    """The command runs. References: clips per second times seconds is the batch; the FLOPs are
    three forward passes; MFU is the share of tflops=."""
    probe.main(["speed", *TINY, f"run={tmp_path}", "steps=1", "tflops=2"])
    row = {key: float(value) for key, value in table(tmp_path, "speed")[0].items()}
    assert row["clips_per_s"] * row["seconds"] == pytest.approx(4)
    flops = 3 * 4 * probe.forward_flops(common.load_config([*TINY, f"run={tmp_path}"]), motion=True)
    assert row["tflops"] * row["seconds"] == pytest.approx(flops / 1e12)
    assert row["mfu"] == pytest.approx(row["tflops"] / 2)


def test_bad_input(run, tmp_path):
    """No stage at all, a folder of videos, an unknown experiment, no number: one line each."""
    with pytest.raises(FileNotFoundError, match="has none of base, control, videojam"):
        probe.main(["permute", "--run", str(tmp_path)])
    with pytest.raises(ValueError, match="found gpus=many, expected gpus= and a number"):
        probe.main(["plan", "gpus=many"])
    with pytest.raises(SystemExit):
        probe.main(["permeate"])


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["speed", "--help"]])
def test_help(capsys, arguments):
    """The docstring and exit status 0, also for plan and speed, which take key=value."""
    with pytest.raises(SystemExit) as left:
        probe.main(arguments)
    assert left.value.code == 0
    assert "probe.py plan preset=4b" in capsys.readouterr().out
