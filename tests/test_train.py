"""The training equations, the draws and the loop. References: numpy, plain loops, the binomial and normal laws, and other ways to run the same steps."""
import json
import math
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import common
import data
import flow
import model as nets
import sample
import train
from conftest import ROOT, TINY, read_state


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- Eqs. 1, 2, 6 ---------------------------------------------------------------------------------------------------

def test_equations_1_and_2():
    """Eq. 1: x_t = t x_1 + (1-t) x_0; Eq. 2: v = x_1 - x_0. Reference: numpy in float64, clip by clip; v is also dx_t/dt."""
    x1, x0, t = rand(3, 2, 2, 4, 5).double(), rand(3, 2, 2, 4, 5, seed=1).double(), torch.tensor([0.0, 0.3, 1.0]).double()
    xt, v = train.interpolate(x1, x0, t), train.velocity(x1, x0)
    for b in range(3):
        np.testing.assert_allclose(xt[b], float(t[b]) * x1[b].numpy() + (1 - float(t[b])) * x0[b].numpy(), rtol=0, atol=1e-14)
        np.testing.assert_allclose(v[b], x1[b].numpy() - x0[b].numpy(), rtol=0, atol=0)
    torch.testing.assert_close(xt[0], x0[0])                                    # 0 is noise
    torch.testing.assert_close(xt[2], x1[2])                                    # 1 is data
    torch.testing.assert_close((train.interpolate(x1, x0, t + 1e-3) - xt) / 1e-3, v, rtol=1e-9, atol=1e-9)


def plain_joint_loss(u, v, keep):
    """Choice 7 number by number, in Python floats."""
    total, half = 0.0, u.shape[1] // 2
    for b in range(len(u)):
        for stream in (0, 1):
            squares = [(float(p) - float(q)) ** 2 for p, q in zip(u[b, stream * half:stream * half + half].flatten(), v[b, stream * half:stream * half + half].flatten())]
            if stream == 0 or bool(keep[b]):
                total += math.fsum(squares) / len(squares)
    return total / len(u)


@pytest.mark.parametrize("keep", [[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1]])
def test_equation_6_with_the_mask(keep):
    """Eq. 6 and choice 7: mean over samples of mse_x + keep mse_d. Reference: a Python loop over single numbers. 1e-5: float32 sums."""
    u, v, keep = rand(4, 6, 2, 3, 2), rand(4, 6, 2, 3, 2, seed=1), torch.tensor(keep, dtype=torch.bool)
    assert train.joint_loss(u, v, keep).item() == pytest.approx(plain_joint_loss(u, v, keep), rel=1e-5)


def test_equation_6_is_the_base_loss_where_nothing_moves_twice():
    """With every sample dropped Eq. 6 is Eq. 3 on the appearance; with both halves alike and kept it is twice that. Reference: torch's mse_loss."""
    u, v = rand(4, 3, 2, 3, 2), rand(4, 3, 2, 3, 2, seed=1)
    both = lambda x: torch.cat([x, x], 1)
    assert train.joint_loss(torch.cat([u, 9 * u], 1), both(v), torch.zeros(4, dtype=torch.bool)).item() == pytest.approx(nn.functional.mse_loss(u, v).item(), rel=1e-6)
    assert train.joint_loss(both(u), both(v), torch.ones(4, dtype=torch.bool)).item() == pytest.approx(2 * nn.functional.mse_loss(u, v).item(), rel=1e-6)


def test_losses_add_up_over_micro_batches():
    """Choice 7: the loss of a batch is the mean of the losses of its halves, also when the dropped samples are spread unevenly."""
    u, v, keep = rand(8, 6, 2, 3, 2), rand(8, 6, 2, 3, 2, seed=1), torch.tensor([0, 0, 0, 1, 1, 1, 1, 1], dtype=torch.bool)
    halves = [train.joint_loss(u[i], v[i], keep[i]).item() for i in (slice(0, 4), slice(4, 8))]
    assert train.joint_loss(u, v, keep).item() == pytest.approx(sum(halves) / 2, rel=1e-6)


def test_a_dropped_motion_half_counts_nothing():
    """Sec. 4.3, camera-ready: where motion is dropped the loss counts appearance only: its motion output has no influence and exactly zero
    gradient; the kept one's gradient is 2 (u - v) / (B numbers of the half)."""
    u, v, keep = rand(2, 6, 2, 3, 2).requires_grad_(), rand(2, 6, 2, 3, 2, seed=1), torch.tensor([True, False])
    loss = train.joint_loss(u, v, keep)
    loss.backward()
    assert not u.grad[1, 3:].any() and u.grad[1, :3].any()
    torch.testing.assert_close(u.grad[0, 3:], (2 * (u - v) / (2 * 3 * 2 * 3 * 2))[0, 3:].detach())
    wild = torch.cat([u[:1], torch.cat([u[1:, :3], 1e6 * u[1:, 3:]], 1)])
    assert torch.equal(train.joint_loss(wild, v, keep), loss)


# ---- The draws ------------------------------------------------------------------------------------------------------

SHAPE = (2, 1, 2, 2)


@pytest.fixture(scope="module")
def draws():
    """50 steps of 100 samples: t, noise, keep_text, keep_motion."""
    got = [train.draw(3, step, index, SHAPE) for step in range(50) for index in range(100)]
    return tuple(torch.stack([torch.as_tensor(x) for x in column]) for column in zip(*got))


def test_thirty_and_twenty_percent(draws):
    """Sec. 4.3: text is dropped 30 %, motion 20 %. Reference: the binomial law of 5,000 draws, four standard deviations; other rates too."""
    for kept, rate in ((draws[2], 0.3), (draws[3], 0.2)):
        assert abs((~kept).float().mean().item() - rate) < 4 * math.sqrt(rate * (1 - rate) / 5000)
    assert all(train.draw(0, 0, i, SHAPE, 0.0, 1.0)[2:] == (True, False) for i in range(50))
    few = sum(not train.draw(0, 0, i, SHAPE, 0.05, 0.0)[2] for i in range(2000))
    assert abs(few - 100) < 4 * math.sqrt(2000 * 0.05 * 0.95)


def test_the_drops_are_independent_and_per_sample(draws):
    """Text, motion and t are drawn each at random, sample by sample. References: the product of the rates in the 2 x 2 table (four standard
    deviations), no correlation with t, and shares per step that scatter like a binomial's: a drop of whole batches would give 0 or 1."""
    t, _, text, motion = draws
    for a, p in ((~text, 0.3), (text, 0.7)):
        for b, q in ((~motion, 0.2), (motion, 0.8)):
            assert abs((a & b).float().mean().item() - p * q) < 4 * math.sqrt(p * q * (1 - p * q) / 5000)
    for kept in (text, motion):
        assert abs(np.corrcoef(t.logit(), kept)[0, 1]) < 4 / math.sqrt(5000)
        shares = kept.float().view(50, 100).mean(1)
        p = kept.float().mean().item()
        assert 0.6 < shares.std().item() / math.sqrt(p * (1 - p) / 100) < 1.4     # 50 steps: the ratio scatters by 0.1
        assert abs(np.corrcoef(kept[:-1], kept[1:])[0, 1]) < 4 / math.sqrt(5000)


def test_t_is_logit_normal(draws):
    """Movie Gen's t: the logit is standard normal. Reference: the largest gap to the normal distribution function, 1.95 / sqrt(n) at 0.1 %."""
    z = draws[0].double().logit().sort()[0]
    normal = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    steps = torch.arange(1, len(z) + 1) / len(z)
    assert max((steps - normal).abs().max(), (normal - steps + 1 / len(z)).abs().max()) < 1.95 / math.sqrt(len(z))
    assert draws[0].min() > 0 and draws[0].max() < 1


def test_t_mean_shifts_the_logit_alone(draws):
    """config t_mean: the same normal number, shifted before the sigmoid, towards noise where negative. Reference: the unshifted draws."""
    shifted = [train.draw(3, step, index, SHAPE, t_mean=-1.0) for step in range(5) for index in range(100)]
    for (t, noise, *keep), plain, plain_noise in zip(shifted, draws[0], draws[1]):
        assert abs(t.double().logit() - (plain.double().logit() - 1)) < 1e-4 and torch.equal(noise, plain_noise)


def test_precision_is_settled_once(tmp_path, monkeypatch):
    """auto becomes what is faster at a run's start and stays so on resume, whatever is faster then. Reference: the run folder's config."""
    monkeypatch.setattr(common, "fastest_precision", lambda device: "bf16")
    make = lambda word: common.load_config([*TINY, f"precision={word}", f"run={tmp_path}"])
    for word in ("auto", "bf16"):
        train.prepare_run(config := make(word), torch.device("cpu"))
        assert config["precision"] == json.loads((tmp_path / "config.json").read_text())["precision"] == "bf16"
        monkeypatch.setattr(common, "fastest_precision", lambda device: "fp32")
    with pytest.raises(ValueError, match="was made with precision='bf16', found precision='fp32'"):
        train.prepare_run(make("fp32"), torch.device("cpu"))
    train.prepare_run(config := make("auto"), torch.device("cpu"))
    assert config["precision"] == "bf16"


def test_noise_is_standard_normal(draws):
    """x_0 ~ N(0, I), x and d each their own. Reference: the normal law of 40,000 numbers; the halves of a sample, neighbours and t uncorrelated."""
    x = draws[1].double()
    assert abs(x.mean()) < 4 / math.sqrt(x.numel()) and abs(x.var() - 1) < 4 * math.sqrt(2 / x.numel())
    assert abs((x ** 4).mean() - 3) < 4 * math.sqrt(96 / x.numel())
    bound = 4 / math.sqrt(20000)
    assert abs((x[:, 0] * x[:, 1]).mean()) < bound and abs((x[1:] * x[:-1]).mean()) < bound
    assert abs((x.flatten(1)[:, 0] * draws[0].logit()).mean()) < 4 / math.sqrt(5000)


def test_a_sample_is_the_same_whoever_asks():
    """Every draw is a function of (seed, step, index): any order, any rank, whatever the global generator did, which stays untouched."""
    keys = [(seed, step, index) for seed in (0, 1) for step in (0, 1, 7) for index in (0, 1, 5)]
    first = {key: train.draw(*key, SHAPE) for key in keys}
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = {key: train.draw(*key, SHAPE) for key in reversed(keys)}
    assert torch.equal(torch.get_rng_state(), state)
    for key in keys:
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(first[key], again[key]))
    assert len({float(t) for t, *_ in first.values()}) == len(keys)             # (0, 1, 7) is not (1, 0, 7)


def test_every_clip_once_per_epoch():
    """clip_index: an epoch is a permutation, another one each time and for each seed, a function of the position; n = 0 counts on for ever."""
    epochs = [[train.clip_index(0, position, 23) for position in range(23 * e, 23 * e + 23)] for e in range(4)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4 and epochs[0] != [train.clip_index(1, p, 23) for p in range(23)]
    assert [train.clip_index(0, p, 23) for p in (91, 0, 45)] == [epochs[3][22], epochs[0][0], epochs[1][22]]
    assert [train.clip_index(0, p, 0) for p in (0, 5, 10**9)] == [0, 5, 10**9]


# ---- TAE ------------------------------------------------------------------------------------------------------------

def fake_tae(mean, logvar, video):
    return types.SimpleNamespace(moments=lambda v: (mean, logvar), reconstruct=lambda z: video, decoder=lambda z: video)


def test_the_losses_of_the_tae():
    """L1 + l2 MSE, kl times KL and outlier times the penalty, mean over positions of max(‖X - mean‖ - 3 ‖std‖, 0). Reference: numpy loops over
    single positions; the textbook KL to the standard normal. One latent dot of clip 1 is far out."""
    config = {"tae": {"l2": 2.0, "kl": 0.5, "outlier": 3.0}}
    video, again = rand(2, 3, 4, 4, 4), rand(2, 3, 6, 4, 4, seed=1)             # two spurious frames at the end are cut
    mean, logvar = rand(2, 5, 4, 4, 4, seed=2), 0.3 * rand(2, 5, 4, 4, 4, seed=3)
    mean[1, :, 2, 1, 3] = 40
    rec, reg = train.tae_loss(video, fake_tae(mean, logvar, again), config, torch.zeros_like(mean))[:2]
    for b in range(2):
        e = again[b, :, :4].double().numpy() - video[b].double().numpy()
        assert rec[b].item() == pytest.approx(np.abs(e).mean() + 2 * (e ** 2).mean(), rel=1e-5)
        m, s2 = mean[b].double().numpy(), np.exp(logvar[b].double().numpy())
        kl = 0.5 * (m ** 2 + s2 - 1 - np.log(s2)).mean()
        centre, spread = m.reshape(5, -1).mean(1), m.reshape(5, -1).std(1, ddof=1)
        dots = [np.linalg.norm(m[:, i, j, k] - centre) - 3 * np.linalg.norm(spread) for i in range(4) for j in range(4) for k in range(4)]
        penalty = np.mean([max(dot, 0) for dot in dots])
        assert (penalty > 0) == (b == 1)
        assert reg[b].item() == pytest.approx(0.5 * kl + 3 * penalty, rel=1e-4)


def test_the_outlier_penalty_spares_gaussian_latents():
    """Movie Gen's penalty is zero on Gaussian latents of 16 channels (the element-wise reading is not) and positive with one bright dot."""
    config = {"tae": {"l2": 0.0, "kl": 0.0, "outlier": 1.0}}
    video, mean = torch.zeros(4, 3, 4, 8, 8), rand(4, 16, 4, 8, 8)
    penalty = lambda mean: train.tae_loss(video, fake_tae(mean, torch.zeros_like(mean), video), config, torch.zeros_like(mean))[1]
    assert not penalty(mean).any()
    assert ((mean - mean.mean((2, 3, 4), keepdim=True)).abs() > 3).any()        # the element-wise reading would not be zero here
    mean[2, :, 1, 3, 3] += 20
    assert (penalty(mean) > 0).tolist() == [False, False, True, False]


def test_noise_enters_with_the_posteriors_width():
    """z = mean + exp(logvar / 2) noise goes to the decoder. Reference: that sum, read where the decoder receives it."""
    seen = []
    mean, logvar, noise = rand(1, 2, 1, 2, 2), rand(1, 2, 1, 2, 2, seed=1), rand(1, 2, 1, 2, 2, seed=2)
    tae = types.SimpleNamespace(moments=lambda v: (mean, logvar), reconstruct=lambda z: seen.append(z) or torch.zeros(1, 3, 4, 4, 4))
    train.tae_loss(torch.zeros(1, 3, 4, 4, 4), tae, {"tae": {"l2": 1.0, "kl": 0.0, "outlier": 0.0}}, noise)
    np.testing.assert_allclose(seen[0], mean.numpy() + np.sqrt(np.exp(logvar.numpy())) * noise.numpy(), rtol=1e-5)


def test_half_of_the_taes_batch_is_painted(monkeypatch):
    """Choice 3: the odd places of the TAE's batch are painted flow, the even ones the clips themselves, however the batch is cut. Reference: clip by clip."""
    config, caught, seen, real = common.load_config([*TINY, "tae.batch=4", "run=nowhere"]), [], [], train.tae_loss

    def fit(config, stage, parts, loss_of, *rest):
        caught.append(loss_of)
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "fit", fit)
    monkeypatch.setattr(train, "tae_loss", lambda video, *rest: seen.append(video) or real(video, *rest))
    clips = data.open_data(config)
    with pytest.raises(KeyboardInterrupt):
        train.train_tae(config, clips, torch.device("cpu"))
    for rows in ([0, 1, 2, 3], [0, 2], [1, 3]):
        caught[0](5, rows)
        for row, video in zip(rows, seen.pop()):
            clip = clips[5 * 4 + row]
            expected = flow.flow_to_rgb(clip["flow"][None], config["flow"]["sigma"])[0] if row % 2 else clip["video"]
            torch.testing.assert_close(video, expected, rtol=0, atol=1e-5)      # one clip or four are drawn in other loops


def test_measured_statistics_normalise_either_stream():
    """Choice 3: with the measured statistics the training latents of each stream have mean 0 and standard deviation 1 per channel.
    Reference: numpy over the encodings of the very clips that were measured; 1e-3: float32 sums."""
    torch.manual_seed(0)
    config = common.load_config([*TINY, "tae.tile=8", "frames=12"])
    tae, clips = common.build_tae(config).eval().requires_grad_(False), data.MovingShapes(12, 16, 16)
    tae.statistics.copy_(train.measure_statistics(tae, clips, config, torch.device("cpu"), count=40))
    assert not torch.allclose(tae.statistics[0], tae.statistics[1], atol=1e-2)  # two streams, two sets
    got = clips.batch(range(40))
    for stream, z in enumerate(data.encode(tae, got, config["flow"]["sigma"]).double().chunk(2, dim=1)):
        z = z.transpose(0, 1).flatten(1).numpy()
        np.testing.assert_allclose(z.mean(1), 0, atol=1e-3)
        np.testing.assert_allclose(z.std(1), 1, atol=1e-3)
    z = data.encode(tae, got, config["flow"]["sigma"])
    torch.testing.assert_close(z[:, 4:], tae.encode(flow.flow_to_rgb(got["flow"], config["flow"]["sigma"]), motion=True))   # d is painted flow


# ---- One batch ------------------------------------------------------------------------------------------------------

def test_one_batch_is_learnt_by_heart():
    """The joint net can fit: one fixed batch (latents, noise, t, drops) to under 10 % of the zero predictor's joint loss, appearance and
    motion each. Reference: the loss of u = 0 on that batch. The surgery stands in the middle, as in training."""
    torch.manual_seed(0)
    text, dit = nets.ByteText(16, 1, 2, 16), nets.DiT(4, 2, 4, 4, dim=64, depth=2, heads=2, hidden=128, text_dims=[16])
    z1, prompts = rand(6, 8, 2, 4, 4), ["red", "green", "blue", "", "cyan", ""]
    t, z0, _, _ = map(torch.stack, zip(*(train.draw(0, 0, i, z1.shape[1:]) for i in range(6))))
    keep = torch.tensor([1, 1, 0, 1, 1, 1], dtype=torch.bool)
    zt, v = train.interpolate(z1, z0, t), train.velocity(z1, z0)
    zt = torch.cat([zt[:, :4], zt[:, 4:] * keep.view(-1, 1, 1, 1, 1)], 1)

    def steps(n, loss_of):
        optimizer = torch.optim.AdamW([*text.parameters(), *dit.parameters()], lr=2e-3, weight_decay=0)
        for k in range(n):
            optimizer.param_groups[0]["lr"] = 2e-3 * min(1, 2 - 2 * k / n)
            loss = loss_of()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(dit.parameters(), 1.0)
            optimizer.step()

    steps(20, lambda: train.mse(dit(zt[:, :4], t, *text(prompts)), v[:, :4]).mean())
    dit.add_motion()
    steps(180, lambda: train.joint_loss(dit(zt, t, *text(prompts)), v, keep))
    with torch.no_grad():
        u = dit(zt, t, *text(prompts))
    assert train.joint_loss(u, v, keep) < 0.1 * train.joint_loss(0 * u, v, keep)
    assert train.mse(u, v)[keep].mean() < 0.1 * train.mse(0 * u, v)[keep].mean()
    ud, vd = u[:, 4:][keep], v[:, 4:][keep]
    assert (ud - vd).square().mean() < 0.1 * vd.square().mean()


# ---- Real training steps --------------------------------------------------------------------------------------------

@pytest.fixture
def fresh(trained, tmp_path, monkeypatch):
    """A function that makes a run folder with the trained TAE (and, if asked for, its base); the report at the end is left out."""
    monkeypatch.setattr(train, "finale", lambda *args: None)
    monkeypatch.setattr(train, "write_samples", lambda *args: None)

    def make(name, *stages):
        run = tmp_path / name
        run.mkdir()
        for stage in ("tae", *stages):
            shutil.copy(trained[0] / f"{stage}.pt", run)
        return run
    return make


def go(run, *overrides):
    train.main([*TINY, f"run={run}", *overrides])


def weights(run, stage):
    return common.read_weights(run / f"{stage}.pt")["weights"]


def assert_same(a, b, atol=0.0):
    assert a.keys() == b.keys()
    for name in a:
        if atol:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda m: f"{name}: {m}")
        else:
            assert torch.equal(a[name], b[name]), name


class Spy:
    """Remembers what the DiT and the text encoder were given, and what the joint loss saw, while train.py trains."""

    def __init__(self, monkeypatch):
        self.dit, self.text, self.loss = [], [], []
        build_dit, build_text, joint = common.build_dit, common.build_text, train.joint_loss

        def spied(build, seen):
            def made(*args, **kwargs):
                net = build(*args, **kwargs)
                net.register_forward_pre_hook(lambda module, inputs: seen.append([x.clone() if torch.is_tensor(x) else x for x in inputs]))
                return net
            return made

        monkeypatch.setattr(common, "build_dit", spied(build_dit, self.dit))
        monkeypatch.setattr(common, "build_text", spied(build_text, self.text))
        monkeypatch.setattr(train, "joint_loss", lambda u, v, keep: self.loss.append((v.clone(), keep.clone())) or joint(u, v, keep))


class FixedLatents:
    """Eight random z and their captions, in place of encoded clips."""
    n = 8

    def __init__(self):
        self.z, self.tae, self.device = rand(8, 8, 2, 4, 4, seed=9), None, None

    def __call__(self, indices):
        return self.z[indices], [f"caption {i}" for i in indices], None


def test_what_the_net_is_given(fresh, monkeypatch):
    """Sec. 4.3 in real training steps of videojam: the input is Eq. 1 of the drawn noise and t; d_t is exactly 0 where motion is dropped, after
    the noising; the text is empty where it is dropped; the target is Eq. 2 for both halves. Reference: numpy on train.draw's numbers and the
    clip order. Half of the samples are dropped here, so that every case occurs."""
    spy, latents = Spy(monkeypatch), FixedLatents()
    config = common.load_config([*TINY, f"run={fresh('spied', 'base')}", "videojam.steps=4", "drop_text=0.5", "drop_motion=0.5"])
    train.train_dit(config, "videojam", latents, torch.device("cpu"))
    assert len(spy.dit) == len(spy.text) == len(spy.loss) == 4
    cases = set()
    for k in range(4):
        step = k + 2                                                            # the base took two
        x, t = spy.dit[k][:2]
        v, keep = spy.loss[k]
        for row in range(4):
            time, noise, keep_text, keep_motion = train.draw(0, step, row, (8, 2, 4, 4), 0.5, 0.5, -0.5)
            clip = train.clip_index(0, 4 * step + row, 8)
            expected = float(time) * latents.z[clip].numpy() + (1 - float(time)) * noise.numpy()
            np.testing.assert_allclose(x[row, :4], expected[:4], atol=1e-6)
            assert t[row] == time and keep[row] == keep_motion
            if keep_motion:
                np.testing.assert_allclose(x[row, 4:], expected[4:], atol=1e-6)
            else:
                assert not x[row, 4:].any()
            assert spy.text[k][0][row] == (f"caption {clip}" if keep_text else "")
            np.testing.assert_allclose(v[row], latents.z[clip].numpy() - noise.numpy(), atol=1e-6)
            cases.add((bool(keep_text), bool(keep_motion)))
    assert len(cases) == 4


def test_the_control_sees_what_videojam_sees(fresh, monkeypatch):
    """DESIGN, section 6: control is the base trained on with the same data order, noise, t and text drops. Reference: the inputs of both."""
    seen = {}
    for stage in ("control", "videojam"):
        with monkeypatch.context() as m:
            spy = Spy(m)
            config = common.load_config([*TINY, f"run={fresh(stage, 'base')}", "videojam.steps=3"])
            train.train_dit(config, stage, FixedLatents(), torch.device("cpu"))
        seen[stage] = spy
    for a, b, prompts, prompts2 in zip(seen["control"].dit, seen["videojam"].dit, seen["control"].text, seen["videojam"].text):
        assert torch.equal(a[0], b[0][:, :4]) and torch.equal(a[1], b[1]) and prompts == prompts2
    assert len(seen["control"].dit) == len(seen["videojam"].dit) == 3


def test_videojam_starts_from_the_averaged_base(fresh, monkeypatch):
    """Sec. 4.2: the fine-tune starts at the base's weights, text encoder included; a learning rate of zero leaves them, and motion stays zero."""
    run = fresh("still", "base")
    config = common.load_config([*TINY, f"run={run}", "videojam.lr=0"])
    train.train_dit(config, "videojam", FixedLatents(), torch.device("cpu"))
    base, after = weights(run, "base"), weights(run, "videojam")
    new = {name: after.pop(name) for name in ("dit.motion_in.weight", "dit.motion_out.weight")}
    assert_same(base, after, atol=1e-7)                                         # lerp of equal numbers rounds
    assert not any(w.any() for w in new.values())


@pytest.mark.parametrize("stage", ["tae", "base", "videojam"])
def test_resuming_is_as_if_never_interrupted(fresh, monkeypatch, stage):
    """Four steps, killed in the third and started again, equal four at once, to the last bit on the CPU: weights, averages, optimiser, draws,
    data order, learning rate. Reference: the run that was not interrupted."""
    straight, torn = (fresh(name, *(["base"] if stage == "videojam" else [])) for name in ("straight", "torn"))
    wanted = [f"stages={stage}", f"{stage}.steps=4", "warmup=1", "cooldown=0.5"]
    if stage == "tae":
        (straight / "tae.pt").unlink(), (torn / "tae.pt").unlink()
    go(straight, *wanted)
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def killed(*args):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return clip(*args)

    with monkeypatch.context() as m:
        m.setattr(torch.nn.utils, "clip_grad_norm_", killed)
        with pytest.raises(KeyboardInterrupt):
            go(torn, *wanted)
    assert not (torn / f"{stage}.pt").exists()
    torch.manual_seed(99)
    go(torn, *wanted)
    assert_same(weights(straight, stage), weights(torn, stage))
    a, b = (read_state(run, stage, 4) for run in (straight, torn))
    for kind in ("net", "ema", "exp_avg", "exp_avg_sq"):
        assert_same(a[kind], b[kind])


def test_the_average_warms_up(fresh):
    """EMA of decay min(ema, (1 + step) / (10 + step)). Reference: the recurrence in numpy over the raw weights of every step's state file;
    with ema = 0.2 the third step is already capped (3/12 > 0.2). 1e-6: float32."""
    run, seen = fresh("average"), []
    for steps in (1, 2, 3, 4):
        go(run, "stages=base", f"base.steps={steps}", "ema=0.2")
        seen.append(read_state(run, "base", steps))
    for step in (1, 2, 3):
        decay = min(0.2, (1 + step) / (10 + step))
        for name, w in seen[step]["net"].items():
            expected = decay * seen[step - 1]["ema"][name].numpy() + (1 - decay) * w.numpy()
            np.testing.assert_allclose(seen[step]["ema"][name], expected, atol=1e-6, err_msg=name)
    assert_same(weights(run, "base"), seen[3]["ema"])


def test_the_learning_rate_warms_up_and_cools_down(fresh):
    """lr rises by lr / (warmup + 1) a step and falls linearly over the last `cooldown` share. Reference: eight numbers by hand, against the log."""
    run = fresh("warm")
    go(run, "stages=base", "base.steps=8", "warmup=3", "cooldown=0.5", "base.lr=4e-4")
    assert [line["lr"] for line in log(run)] == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4, 4e-4, 3e-4, 2e-4, 1e-4])


@pytest.mark.parametrize("stage", ["tae", "base", "videojam"])
def test_micro_batches_give_the_same_weights(fresh, stage):
    """Gradient accumulation: one clip at a time equals the whole batch. Drops at 50 % make micro-batches with nothing kept. Three steps of AdamW
    at 1e-4 move a weight by up to 3e-4; the other order of summation may move it 1e-5 elsewhere (3e-5 in the TAE, some of whose biases almost
    cancel in the norm that follows). AdamW does not see the gradient's scale, so the norm in the log is compared too, to 0.1 %."""
    runs = [fresh(name, *(["base"] if stage == "videojam" else [])) for name in ("whole", "single")]
    for run, micro in zip(runs, (0, 1)):
        if stage == "tae":
            (run / "tae.pt").unlink()
        go(run, f"stages={stage}", "tae.steps=3", f"base.steps={2 if stage == 'videojam' else 3}", "videojam.steps=3", f"micro_batch={micro}",
           "drop_motion=0.5", "tae.lr=1e-4", "base.lr=1e-4", "videojam.lr=1e-4")
    assert_same(*(weights(run, stage) for run in runs), atol=3e-5 if stage == "tae" else 1e-5)
    assert len(log(runs[0])) == 3
    for one, other in zip(*map(log, runs)):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5, abs=2e-5) and one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_finished_stages_are_skipped(fresh, capsys):
    """A second call leaves every file as it is, and says so; more steps go on from the state."""
    run = fresh("skip")
    go(run, "stages=tae,base")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    go(run, "stages=tae,base")
    out = capsys.readouterr().out
    assert "tae: already in" in out and "base: already in" in out
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    go(run, "stages=base", "base.steps=3")
    assert "resumed at step 2" in capsys.readouterr().out and common.read_weights(run / "base.pt")["step"] == 3


def log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_no_step_stands_twice_in_the_log(fresh, monkeypatch):
    """Killed after logging what was not yet saved, and resumed: the log has each step once. Reference: the steps, counted."""
    run = fresh("torn")
    monkeypatch.setattr(train, "log_line", (lambda log_line: lambda *args, **kw: log_line(*args, **kw) or args[2] == 3 and 1 / 0)(train.log_line))
    with pytest.raises(ZeroDivisionError):
        go(run, "stages=base", "base.steps=4", "save_every=2")
    assert [line["step"] for line in log(run)] == [1, 2, 3]
    monkeypatch.undo()
    monkeypatch.setattr(train, "finale", lambda *args: None)
    go(run, "stages=base", "base.steps=4", "save_every=2")
    assert [line["step"] for line in log(run)] == [1, 2, 3, 4]


def test_the_log_line(fresh, monkeypatch):
    """One JSON line per interval: step, loss, loss of appearance and motion, loss per tenth of t, clips per second, lr. Reference: the mean of
    the losses that joint_loss returned in those steps; loss = loss_x + share kept * loss_d (choice 7); the bins that were hit are those of the
    drawn t, and their mean, weighted by the hits, is loss_x."""
    losses, joint = [], train.joint_loss
    monkeypatch.setattr(train, "joint_loss", lambda *args: losses.append(joint(*args)) or losses[-1])
    run = fresh("logged", "base")
    go(run, "stages=videojam", "videojam.steps=5", "log_every=2", "drop_motion=0.5")
    lines = log(run)
    assert [line["step"] for line in lines] == [2, 4, 5] and all(line["stage"] == "videojam" for line in lines)
    for line, steps in zip(lines, ((0, 1), (2, 3), (4,))):
        assert line["loss"] == pytest.approx(np.mean([losses[s].item() for s in steps]), abs=2e-5)
        drawn = [train.draw(0, 2 + s, row, (8, 2, 4, 4), 0.3, 0.5, -0.5) for s in steps for row in range(4)]
        hits = np.histogram([float(t) for t, *_ in drawn], bins=10, range=(0, 1))[0]
        assert len(line["loss_x_by_t"]) == 10 and [x is not None for x in line["loss_x_by_t"]] == (hits > 0).tolist()
        mean = sum(x * n for x, n in zip(line["loss_x_by_t"], hits) if n) / hits.sum()
        assert mean == pytest.approx(line["loss_x"], abs=2e-4)
        share = np.mean([bool(keep) for *_, keep in drawn])
        assert line["loss"] == pytest.approx(line["loss_x"] + share * line["loss_d"], abs=1e-4)
        assert line["clips_per_s"] > 0 and line["lr"] == 1e-3


def test_a_loss_that_is_not_finite_stops_the_run(fresh, monkeypatch):
    """Point 6 of the issue: NaN stops, names the step, and leaves the last checkpoint and the weights untouched. Reference: their bytes."""
    run = fresh("nan")
    go(run, "stages=base", "base.steps=2")
    files = [path for path in (run / "base.pt", *(run / "base.state").rglob("*")) if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    velocity, calls = train.velocity, []
    monkeypatch.setattr(train, "velocity", lambda x1, x0: calls.append(0) or velocity(x1, x0) * (math.nan if len(calls) == 2 else 1))
    with pytest.raises(ValueError, match="base.*step 3") as error:
        go(run, "stages=base", "base.steps=5", "save_every=9")
    assert "\n" not in str(error.value) and len(calls) == 2
    assert {path: path.read_bytes() for path in (run / "base.pt", *(run / "base.state").rglob("*")) if path.is_file()} == before


def test_a_state_of_another_parent_is_refused(fresh):
    """A half-trained videojam does not go on when its base was trained anew: ValueError that says what to delete."""
    run = fresh("parent", "base")
    go(run, "stages=videojam", "videojam.steps=2")
    (run / "base.pt").unlink()
    go(run, "stages=base", "base.steps=3")
    with pytest.raises(ValueError, match="videojam.pt was trained on another base"):
        go(run, "stages=videojam", "base.steps=3", "videojam.steps=3")


def test_importing_does_no_work():
    """Every file imports without doing work: nothing on stdout, no folder made, no thread or generator changed."""
    code = ("import os, torch; before = sorted(os.listdir('.')); state = torch.get_rng_state()\n"
            "import train, sample, data, flow, model, common, metrics, videos\n"
            "assert torch.equal(state, torch.get_rng_state()) and sorted(set(os.listdir('.')) - {'__pycache__'}) == sorted(set(before) - {'__pycache__'})")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
