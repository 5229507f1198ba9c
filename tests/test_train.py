"""The equations, the draws, the TAE's losses and the training loop.

References: numpy, loops over single numbers, the binomial and normal laws, and other ways to take
the same training steps.
"""
import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import data
import flow
import train
from conftest import TINY, command, folder, read_log, read_state, states


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def go(run, *arguments):
    train.main([*TINY, f"run={run}", *arguments])


@pytest.fixture
def fresh(trained, tmp_path, quiet):
    """A function that makes a run folder with some stages of the trained run."""
    def make(name, *stages):
        return folder(trained, tmp_path / name, *stages)
    return make


def columns(drawn):
    """What train.draw returned for several clips: t, noise, keep_text, keep_motion, stacked."""
    return [torch.stack(column) for column in zip(*drawn)]


# -------------------------------------------------------------------------------------------------
# Eqs. 1, 2, 6


def test_equations_1_and_2():
    """x_t = t x_1 + (1 - t) x_0 and v = x_1 - x_0, clip by clip in numpy; v is also dx_t / dt."""
    x1 = normal(3, 2, 2, 4, 5).double()
    x0 = normal(3, 2, 2, 4, 5, seed=1).double()
    times = [0.0, 0.3, 1.0]                             # noise, in between, data
    t = torch.tensor(times, dtype=torch.float64)
    xt = train.interpolate(x1, x0, t)
    v = train.velocity(x1, x0)
    for b, time in enumerate(times):
        expected = time * x1[b].numpy() + (1 - time) * x0[b].numpy()
        np.testing.assert_allclose(xt[b], expected, rtol=0, atol=1e-14)
        np.testing.assert_array_equal(v[b], x1[b].numpy() - x0[b].numpy())
    slope = (train.interpolate(x1, x0, t + 1e-3) - xt) / 1e-3
    torch.testing.assert_close(slope, v, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("keep", [[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1]])
def test_equation_6_with_the_mask(keep):
    """The mean over clips of mse_x + keep mse_d, by a loop over single numbers in Python."""
    u = normal(4, 6, 2, 3, 2)
    v = normal(4, 6, 2, 3, 2, seed=1)
    total = 0.0
    for b in range(4):
        for stream, weight in ((slice(0, 3), 1), (slice(3, 6), keep[b])):
            pairs = zip(u[b, stream].flatten().tolist(), v[b, stream].flatten().tolist())
            total += weight * math.fsum((p - q) ** 2 for p, q in pairs) / 36
    loss = train.joint_loss(u, v, torch.tensor(keep, dtype=torch.bool))
    assert loss.item() == pytest.approx(total / 4, rel=1e-5)            # float32 sums


# -------------------------------------------------------------------------------------------------
# The draws

SETTINGS = common.Config(seed=3, t_mean=0.0, drop_text=0.3, drop_motion=0.2)
SHAPE = (2, 1, 2, 2)


@pytest.fixture(scope="module")
def draws():
    """50 steps of 100 clips: t, noise, keep_text, keep_motion."""
    keys = [(step, row) for step in range(50) for row in range(100)]
    return columns(train.draw(SETTINGS, step, row, SHAPE) for step, row in keys)


def test_text_and_motion_are_dropped_at_their_rates(draws):
    """30 % and 20 % (sec. 4.3), independently: the 2 x 2 table is the binomial law's.

    Within four standard deviations: a table fails by chance once in 4,000, and the seed is fixed.
    """
    _, _, text, motion = draws
    for a, p in ((text, 0.7), (~text, 0.3)):
        for b, q in ((motion, 0.8), (~motion, 0.2)):
            deviation = math.sqrt(p * q * (1 - p * q) / 5000)
            assert (a & b).float().mean() == pytest.approx(p * q, abs=4 * deviation)
    other = common.Config(SETTINGS, drop_text=0.0, drop_motion=1.0)
    _, _, text, motion = columns(train.draw(other, 0, row, SHAPE) for row in range(200))
    assert text.all() and not motion.any()


def test_drops_are_per_clip(draws):
    """Shares per batch scatter like a binomial's (whole batches: 0 or 1); t knows of neither."""
    t, _, *drops = draws
    for kept in drops:
        share = kept.float().mean().item()
        scatter = kept.float().view(50, 100).mean(1).std().item()
        expected = math.sqrt(share * (1 - share) / 100)
        assert scatter == pytest.approx(expected, rel=0.4)      # over 50 batches it varies by 0.1
        assert abs(np.corrcoef(kept[:-1], kept[1:])[0, 1]) < 4 / math.sqrt(5000)
        assert abs(np.corrcoef(t.logit(), kept)[0, 1]) < 4 / math.sqrt(5000)


def test_t_is_logit_normal_around_t_mean(draws):
    """Kolmogorov-Smirnov: the gap to the normal law passes 1.95 / sqrt(n) once in 1,000 times.

    t_mean shifts the same normal number; noise and drops stay.
    """
    logit = draws[0].double().logit().sort()[0]
    law = 0.5 * (1 + torch.erf(logit / math.sqrt(2)))
    gap = (torch.arange(1, 5001) / 5000 - law).abs().max()
    assert gap < 1.95 / math.sqrt(5000)
    other = common.Config(SETTINGS, t_mean=-1.0)
    t, *others = columns(train.draw(other, 0, row, SHAPE) for row in range(100))
    torch.testing.assert_close(t.logit(), draws[0][:100].logit() - 1, rtol=0, atol=1e-4)
    for a, b in zip(others, draws[1:]):
        assert torch.equal(a, b[:100])


def test_noise_is_standard_normal(draws):
    """Mean 0, variance 1; x, d, the next clip's and t are uncorrelated; four deviations each."""
    t, x = draws[0].logit(), draws[1].flatten(1).double()               # (5000,), (5000, 8)
    assert abs(x.mean()) < 4 / math.sqrt(40000)
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / 40000)
    for a, b in ((x[:, :4], x[:, 4:]), (x[1:], x[:-1]), (x[:, 0], t)):
        assert abs((a * b).mean()) < 4 / math.sqrt(a.numel())


def test_a_draw_follows_from_seed_step_and_row():
    """In any order and whatever the global generator did, which is left alone; no two alike."""
    keys = [(seed, step, row) for seed in (0, 1) for step in (0, 1, 7) for row in (0, 1, 7)]
    drawn = {}
    for order in (keys, keys[::-1]):
        torch.manual_seed(len(drawn))
        state = torch.get_rng_state()
        for seed, step, row in order:
            values = train.draw(common.Config(SETTINGS, seed=seed), step, row, SHAPE)
            for a, b in zip(values, drawn.setdefault((seed, step, row), values)):
                assert torch.equal(a, b)
        assert torch.equal(torch.get_rng_state(), state)
    assert len({t.item() for t, *_ in drawn.values()}) == len(keys)     # (0, 1, 7) is not (1, 0, 7)


def test_every_clip_once_per_epoch():
    """Of 24 clips, each once in 6 steps of 4, in a new order each time and for each seed."""
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (0, 2), (1, 0)):
        steps = range(6 * epoch, 6 * epoch + 6)
        numbers = [train.clip_numbers(seed, step, range(4), 4, count=24) for step in steps]
        orders.append(sum(numbers, []))
        assert sorted(orders[-1]) == list(range(24))
    assert len(set(map(tuple, orders))) == 4
    assert train.clip_numbers(0, 3, [2], 4, count=24) == [orders[0][14]]    # a rank's own row
    assert train.clip_numbers(0, 10**9, [0, 3], 4, count=0) == [4 * 10**9, 4 * 10**9 + 3]


# -------------------------------------------------------------------------------------------------
# The TAE


def test_the_losses_of_the_tae():
    """L1 + l2 MSE, the KL to the normal law, the outlier penalty: numpy over single positions.

    The decoder is given mean + deviation x noise; frames beyond the video's are cut.
    """
    config = common.Config(tae=common.Config(l2=2.0, kl=0.5, outlier=3.0))
    video = normal(2, 3, 4, 4, 4)
    again = normal(2, 3, 6, 4, 4, seed=1)
    mean = normal(2, 5, 4, 4, 4, seed=2)
    mean[1, :, 2, 1, 3] = 40                            # one latent dot of clip 1 is far out
    logvar = 0.3 * normal(2, 5, 4, 4, 4, seed=3)
    noise = normal(2, 5, 4, 4, 4, seed=4)

    def reconstruct(z):
        expected = mean.numpy() + np.sqrt(np.exp(logvar.numpy())) * noise.numpy()
        np.testing.assert_allclose(z, expected, rtol=1e-5, atol=1e-6)
        return again

    tae = types.SimpleNamespace(moments=lambda video: (mean, logvar), reconstruct=reconstruct)
    got = train.tae_loss(config, tae, video, noise)
    for b, (reconstruction, regulariser, square) in enumerate(zip(*got)):
        error = (again[b, :, :4] - video[b]).double().numpy()
        squared = (error ** 2).mean()
        assert square.item() == pytest.approx(squared, rel=1e-5)
        assert reconstruction.item() == pytest.approx(np.abs(error).mean() + 2 * squared, rel=1e-5)
        m = mean[b].double().numpy().reshape(5, 64)
        variance = np.exp(logvar[b].double().numpy()).reshape(5, 64)
        kl = 0.5 * (m ** 2 + variance - 1 - np.log(variance)).mean()
        spread = np.linalg.norm(m.std(1, ddof=1))
        distances = [np.linalg.norm(m[:, p] - m.mean(1)) for p in range(64)]
        penalty = np.mean([max(distance - 3 * spread, 0) for distance in distances])
        assert (penalty > 0) == (b == 1)
        assert regulariser.item() == pytest.approx(0.5 * kl + 3 * penalty, rel=1e-4)


@pytest.mark.parametrize("micro_batch", [0, 1])
def test_half_of_the_taes_batch_is_painted(fresh, monkeypatch, micro_batch):
    """Odd rows are painted flow, even rows the clips, however the batch is cut: clip by clip.

    Painted errors count tae.motion times; the log keeps the two kinds apart.
    """
    tae_loss = train.tae_loss
    seen = []

    def watched(config, tae, video, noise):
        parts = tae_loss(config, tae, video, noise)
        seen.extend(zip(video, *[part.tolist() for part in parts]))
        return parts

    monkeypatch.setattr(train, "tae_loss", watched)
    run = fresh("painted")
    settings = ["tae.steps=1", "tae.batch=4", "tae.motion=3", f"tae.micro_batch={micro_batch}"]
    go(run, "stages=tae", *settings)
    total = 0
    for row, (video, reconstruction, regulariser, square) in enumerate(seen):
        clip = data.MovingShapes(8, 16, 16)[row]
        painted = flow.flow_to_rgb(clip["flow"][None], sigma=0.1)[0]
        expected = painted if row % 2 else clip["video"]
        torch.testing.assert_close(video, expected, rtol=0, atol=1e-5)
        total += (3 if row % 2 else 1) * reconstruction + regulariser
    line = read_log(run)[0]
    assert line["loss"] == pytest.approx(total / 4, abs=2e-5)
    assert line["mse_x"] == pytest.approx((seen[0][3] + seen[2][3]) / 2, abs=2e-5)
    assert line["mse_d"] == pytest.approx((seen[1][3] + seen[3][3]) / 2, abs=2e-5)


def test_the_statistics_normalise_both_streams():
    """With them the latents of each stream have mean 0 and deviation 1 per channel, by numpy."""
    torch.manual_seed(0)
    config = common.load_config([*TINY, "run=nowhere", "frames=12"])
    clips = data.MovingShapes(12, 16, 16)
    clips.count = 40
    tae = common.build_tae(config).eval().requires_grad_(False)
    train.measure_statistics(config, tae, clips, torch.device("cpu"))
    assert not torch.allclose(tae.statistics[0], tae.statistics[1], atol=1e-2)
    batch = clips.batch(range(40))
    z = data.encode(config, tae, batch)                                 # (40, 2C, T, H, W)
    numbers = z.transpose(0, 1).flatten(1).double().numpy()
    np.testing.assert_allclose(numbers.mean(1), 0, atol=1e-3)           # float32 sums
    np.testing.assert_allclose(numbers.std(1), 1, atol=1e-3)
    painted = tae.encode(flow.flow_to_rgb(batch["flow"], config.flow.sigma), motion=True)
    torch.testing.assert_close(z[:, 4:], painted)                       # d is painted flow


# -------------------------------------------------------------------------------------------------
# What the nets are given in real training steps


@pytest.fixture
def watch(fresh, monkeypatch):
    """A function that trains a stage -> of each step what the nets were given and gave."""
    dit_loss = train.dit_loss

    def train_and_watch(stage, *arguments):
        steps = []

        def watched(net, z1, *more):
            seen = types.SimpleNamespace(z1=z1)
            steps.append(seen)

            def look_at_text(module, inputs, output):
                seen.prompts = inputs[0]

            def look_at_dit(module, inputs, output):
                seen.x, seen.t = inputs[:2]
                seen.u = output.detach()

            with net.text.register_forward_hook(look_at_text), \
                    net.dit.register_forward_hook(look_at_dit):
                seen.loss, numbers = dit_loss(net, z1, *more)
            return seen.loss, numbers

        monkeypatch.setattr(train, "dit_loss", watched)
        run = fresh(stage, "tae", "base")
        go(run, f"stages={stage}", "save_every=9", *arguments)
        return steps
    return train_and_watch


def test_what_the_net_is_given(watch):
    """Eq. 1 of the drawn noise, d_t exactly 0 and the text empty where dropped, Eqs. 2 and 6.

    Reference: numpy on the numbers of train.draw. Half is dropped, so that every case occurs.
    """
    settings = common.Config(seed=0, t_mean=-0.5, drop_text=0.5, drop_motion=0.5)
    steps = watch("videojam", "videojam.steps=4", "drop_text=0.5", "drop_motion=0.5")
    cases = set()
    for step, seen in enumerate(steps, start=2):                        # the base took two
        loss = 0
        for row, clip in enumerate(train.clip_numbers(0, step, range(4), 4, 8)):
            t, z0, keep_text, keep_motion = train.draw(settings, step, row, (8, 2, 4, 4))
            z1, x = seen.z1[row].numpy(), seen.x[row]
            zt = t.item() * z1 + (1 - t.item()) * z0.numpy()
            np.testing.assert_allclose(x[:4], zt[:4], atol=1e-6)
            if keep_motion:
                np.testing.assert_allclose(x[4:], zt[4:], atol=1e-6)
            assert x[4:].any() == keep_motion
            caption = data.MovingShapes(8, 16, 16)[clip]["caption"]
            assert seen.prompts[row] == (caption if keep_text else "")
            assert seen.t[row] == t
            error = (seen.u[row].numpy() - (z1 - z0.numpy())) ** 2
            loss += (error[:4].mean() + keep_motion.item() * error[4:].mean()) / 4
            cases.add((bool(keep_text), bool(keep_motion)))
        assert seen.loss.item() == pytest.approx(loss, rel=1e-5)
    assert len(steps) == len(cases) == 4


def test_the_control_sees_what_videojam_sees(watch):
    """Same clips, noise, t, text drops and number of steps; the control without motion (Eq. 3).

    Reference for Eq. 3: torch's mse_loss, with v = (x_1 - x_t) / (1 - t), which follows from Eq. 1.
    """
    control = watch("control", "videojam.steps=3")
    videojam = watch("videojam", "videojam.steps=3")
    assert len(control) == len(videojam) == 3
    for one, other in zip(control, videojam):
        assert torch.equal(one.x, other.x[:, :4])
        assert torch.equal(one.t, other.t)
        assert one.prompts == other.prompts
        v = (one.z1[:, :4] - one.x) / (1 - one.t.view(4, 1, 1, 1, 1))
        torch.testing.assert_close(one.loss, F.mse_loss(one.u, v), rtol=1e-4, atol=0)


def weights(run, stage):
    return common.read_weights(run / f"{stage}.pt")["weights"]


def assert_same(a, b, atol=0.0):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=f"{name} differs")


# the stages that a stage stands on
BELOW = dict(tae=[], base=["tae"], control=["tae", "base"], videojam=["tae", "base"])


def test_videojam_starts_from_the_averaged_base(fresh):
    """Sec. 4.2: a learning rate of 0 leaves the base's weights, and 0 in the motion layers."""
    run = fresh("still", "tae", "base")
    go(run, "stages=videojam", "videojam.lr=0")
    after = weights(run, "videojam")
    assert not after.pop("dit.motion_in.weight").any()
    assert not after.pop("dit.motion_out.weight").any()
    assert_same(after, weights(run, "base"), atol=1e-7)                 # averaging equals rounds


@pytest.mark.parametrize("stage", common.STAGES)
def test_resuming_is_as_if_never_interrupted(fresh, monkeypatch, stage):
    """Killed in the third of four steps and started again: the same bits as without the kill."""
    straight, torn = fresh("straight", *BELOW[stage]), fresh("torn", *BELOW[stage])
    steps = f"{stage}.steps=4".replace("control", "videojam")
    wanted = [f"stages={stage}", steps, "warmup=1", "cooldown=0.5"]
    go(straight, *wanted)
    average_and_limit_gradients = common.average_and_limit_gradients
    calls = []

    def killed(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return average_and_limit_gradients(*args)

    monkeypatch.setattr(common, "average_and_limit_gradients", killed)
    with pytest.raises(KeyboardInterrupt):
        go(torn, *wanted)
    assert not (torn / f"{stage}.pt").exists()
    torch.manual_seed(99)
    go(torn, *wanted)
    assert len(calls) == 3 + 2                                          # two steps were kept
    assert_same(weights(straight, stage), weights(torn, stage))
    one, other = read_state(straight, stage, 4), read_state(torn, stage, 4)
    for kind in ("net", "average", "exp_avg", "exp_avg_sq"):
        assert_same(one[kind], other[kind])


def test_the_average_warms_up(fresh):
    """Decay min(ema, (1 + step) / (10 + step)): the recurrence over the weights of every step."""
    run = fresh("average", "tae")
    seen = []
    for steps in (1, 2, 3, 4):
        go(run, "stages=base", f"base.steps={steps}", "ema=0.2")
        seen.append(read_state(run, "base", steps))
    for step, decay in ((1, 2 / 11), (2, 0.2), (3, 0.2)):               # 3 / 12 is over 0.2
        for name, w in seen[step]["net"].items():
            expected = decay * seen[step - 1]["average"][name] + (1 - decay) * w
            torch.testing.assert_close(seen[step]["average"][name], expected, rtol=0, atol=1e-6)
    assert_same(weights(run, "base"), seen[3]["average"])               # what is kept


def test_the_learning_rate(fresh):
    """It warms up, stays, and falls over the last `cooldown` share: eight numbers by hand."""
    run = fresh("warm", "tae")
    go(run, "stages=base", "base.steps=8", "warmup=3", "cooldown=0.5", "base.lr=4e-4",
       "save_every=9")
    rates = [line["lr"] for line in read_log(run)]
    assert rates == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4, 4e-4, 3e-4, 2e-4, 1e-4])


@pytest.mark.parametrize("rate, learning", [(0, {"dit"}), (1, {"dit", "text"})])
def test_the_text_encoder_has_a_rate_of_its_own(fresh, rate, learning):
    """text.lr is a factor: at 0 nothing of the text encoder moves away from the base's."""
    run = fresh("text", "tae", "base")
    go(run, "stages=videojam", f"text.lr={rate}", "save_every=9")
    after = weights(run, "videojam")
    moved = [name for name, w in weights(run, "base").items() if (after[name] - w).norm() > 1e-5]
    assert {name.partition(".")[0] for name in moved} == learning


@pytest.mark.parametrize("stage", ["tae", "base", "videojam"])
def test_micro_batches_give_the_same_weights(fresh, stage):
    """One clip at a time, half of them with motion dropped, equals the whole batch.

    AdamW does not see the scale of a gradient, so its norm in the log is compared too.
    """
    runs = [fresh("whole", *BELOW[stage]), fresh("single", *BELOW[stage])]
    for run, size in zip(runs, (0, 1)):
        # Three steps at 1e-4 move a weight by 3e-4; another order of summation by a tenth of it.
        go(run, f"stages={stage}", f"{stage}.steps=3", f"{stage}.lr=1e-4", "drop_motion=0.5",
           f"micro_batch={size}", f"tae.micro_batch={size}", "save_every=9")
    assert_same(*[weights(run, stage) for run in runs], atol=3e-5)
    logs = [read_log(run) for run in runs]
    assert len(logs[0]) == len(logs[1]) == 3
    for whole, single in zip(*logs):
        assert whole["loss"] == pytest.approx(single["loss"], abs=3e-5)
        assert whole["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-3)


def test_the_gradient_is_clipped_to_norm_1():
    """(3, 4) has norm 5 and becomes (0.6, 0.8)."""
    net = torch.nn.Linear(2, 1, bias=False)
    net.weight.grad = torch.tensor([[3.0, 4.0]])
    assert common.average_and_limit_gradients(net, 1.0) == pytest.approx(5)
    torch.testing.assert_close(net.weight.grad, torch.tensor([[0.6, 0.8]]), rtol=0, atol=1e-5)


def test_samples_along_the_way_show_the_average_and_leave_the_training_alone(fresh, monkeypatch):
    """sample_every=1: the net that is sampled is the state's average; the weights end the same."""
    without, run = fresh("without", "tae"), fresh("with", "tae")
    go(without, "stages=base", "base.steps=3")
    shown = []

    def show_samples(config, stage, latents, net, step):
        shown.append(step)
        assert not net.training
        assert_same(dict(net.state_dict()), read_state(run, "base", step)["average"])

    monkeypatch.setattr(train, "show_samples", show_samples)
    go(run, "stages=base", "base.steps=3", "sample_every=1")
    assert shown == [1, 2, 3]
    assert_same(weights(run, "base"), weights(without, "base"))


def test_no_step_stands_twice_in_the_log(fresh):
    """Lines of steps that were not saved before a kill, and a torn one, give way to new ones."""
    run = fresh("torn", "tae")
    go(run, "stages=base", "base.steps=2")
    with open(run / "log.jsonl", "a") as file:
        file.write('{"stage": "tae", "step": 4}\n{"stage": "base", "step": 3}\n{"stage": "ba')
    go(run, "stages=base", "base.steps=4")
    found = [(line["stage"], line["step"]) for line in read_log(run)]
    assert found == [("base", 1), ("base", 2), ("tae", 4), ("base", 3), ("base", 4)]


def test_the_log_line(watch, tmp_path):
    """Means over the interval's steps; losses by tenths of t; the motion loss over the kept."""
    seen = watch("videojam", "videojam.steps=5", "log_every=2", "drop_motion=0.5")
    lines = read_log(tmp_path / "videojam")
    assert [line["step"] for line in lines] == [2, 4, 5]
    for line, own in zip(lines, (seen[:2], seen[2:4], seen[4:])):
        mean = np.mean([step.loss.item() for step in own])
        assert line["loss"] == pytest.approx(mean, abs=2e-5)
        times = torch.cat([step.t for step in own])
        hits = np.histogram(times.numpy(), bins=10, range=(0, 1))[0]
        assert [loss is not None for loss in line["loss_x_by_t"]] == (hits > 0).tolist()
        by_t = [loss or 0 for loss in line["loss_x_by_t"]]
        assert np.average(by_t, weights=hits) == pytest.approx(line["loss_x"], abs=2e-4)
        kept = torch.cat([step.x[:, 4:].flatten(1).any(1) for step in own]).float().mean().item()
        assert line["loss"] == pytest.approx(line["loss_x"] + kept * line["loss_d"], abs=1e-4)
        assert line["clips_per_s"] == pytest.approx(4 / line["seconds_per_step"], rel=0.1)


def test_a_gradient_that_is_not_finite_changes_nothing(fresh, monkeypatch, capsys):
    """NaN in the third and fourth of five steps: weights and moments stay as they were, and AdamW
    counts three steps. Reference: the states; the log names the share."""
    run = fresh("some", "tae")
    velocity = train.velocity
    calls = []

    def now_and_then(x1, x0):
        calls.append(1)
        return velocity(x1, x0) * (math.nan if len(calls) in (3, 4) else 1)

    monkeypatch.setattr(train, "velocity", now_and_then)
    go(run, "stages=base", "base.steps=4")
    three, four = read_state(run, "base", 3), read_state(run, "base", 4)
    for kind in ("net", "exp_avg", "exp_avg_sq"):
        assert_same(four[kind], three[kind])
    go(run, "stages=base", "base.steps=5")
    five = read_state(run, "base", 5)
    assert {step.item() for step in five["step"].values()} == {3}
    assert any((five["net"][name] != w).any() for name, w in four["net"].items())
    assert [line["skipped"] for line in read_log(run)] == [0, 0, 1, 1, 0]
    assert capsys.readouterr().out.count("100% of the gradients up to step") == 2


def test_ten_bad_gradients_in_a_row_stop(fresh, monkeypatch):
    """One line names stage and step; what was there stays; a lower rate and clip go on."""
    run = fresh("nan", "tae")
    go(run, "stages=base")
    more = ["stages=base", "base.steps=30", "save_every=9"]
    before = read_state(run, "base", 2)
    velocity = train.velocity
    with monkeypatch.context() as patch:
        patch.setattr(train, "velocity", lambda x1, x0: velocity(x1, x0) * math.nan)
        with pytest.raises(ValueError, match="^base: at step 13, 10 gradients in a row"):
            go(run, *more)
    assert states(run, "base") == ["step-2", "step-9"]
    for kind, tensors in read_state(run, "base", 9).items():
        # The average goes on towards the weights, which it had met to within 1e-2.
        assert_same(tensors, before[kind], atol=0 if kind != "average" else 1e-2)
    assert common.read_weights(run / "base.pt")["step"] == 2
    go(run, *more, "base.lr=1e-4", "clip=0.5")
    assert common.read_weights(run / "base.pt")["step"] == 30


def test_the_limit_of_the_gradient_is_the_configs(fresh):
    """After one step the first moments have the norm (1 - 0.9) clip, as the gradient was longer."""
    run = fresh("clip", "tae")
    go(run, "stages=base", "base.steps=1", "clip=0.01")
    moments = read_state(run, "base", 1)["exp_avg"].values()
    assert torch.stack([m.norm() for m in moments]).norm().item() == pytest.approx(1e-3, rel=1e-3)
    assert read_log(run)[0]["grad_norm"] > 0.01


def test_a_stage_of_another_parent(fresh, capsys):
    """Finished weights may not stand on a base that was trained anew since; a state of the old base
    is named, and not gone on from. Reference: the step at which the stage starts."""
    run = fresh("parent", "tae", "base")
    go(run, "stages=videojam")
    (run / "base.pt").unlink()
    go(run, "stages=base", "base.steps=3")
    with pytest.raises(ValueError, match="videojam.pt was trained on another base.pt"):
        go(run, "stages=videojam", "videojam.steps=3")
    (run / "videojam.pt").unlink()
    capsys.readouterr()
    go(run, "stages=videojam", "videojam.steps=3")
    out = capsys.readouterr().out
    assert "parameters, step 0 to 3" in out and "left by a training from other weights" in out


def test_a_base_of_another_tae_is_refused(fresh):
    """Its latents would mean something else. Here one number of the TAE has changed."""
    run = fresh("other", "tae", "base")
    saved = torch.load(run / "tae.pt", weights_only=True)
    saved["weights"]["statistics"][0, 0, 0] += 1
    common.save(run / "tae.pt", saved)
    with pytest.raises(ValueError, match="base.pt was trained on another tae.pt .* delete base"):
        go(run, "stages=videojam")


def test_importing_does_no_work():
    """Nothing is printed, no file made, no random number drawn, no process group joined."""
    code = ("import os, torch\n"
            "before = set(os.listdir())\n"
            "state = torch.get_rng_state()\n"
            "import common, data, flow, metrics, model, probe, sample, train, videos\n"
            "assert torch.equal(state, torch.get_rng_state())\n"
            "assert set(os.listdir()) - before <= {'__pycache__'}\n"
            "assert not torch.distributed.is_initialized()\n")
    assert command("-c", code) == (0, "", "")
