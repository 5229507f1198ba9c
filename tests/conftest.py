"""What the test files share: a config that trains in seconds, processes, one trained run."""
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

# Every size and number of steps is given: no test depends on a default that is still being tuned.
TINY = """device=cpu precision=fp32 frames=8 height=16 width=16 fps=8 batch=4 micro_batch=0
    checkpointing=false compile=never data.root= data.cache=8 world.texture=0 world.size=1
    world.basic=0.5 flow.sigma=0.1 tae.steps=2 tae.batch=2 tae.lr=1e-3 tae.channels=4
    tae.widths=[8,8,16] tae.blocks=[0,0] tae.spatial=4 tae.temporal=4 tae.tile=8 tae.motion=2
    tae.l2=2 text.lr=1 text.dim=16 text.depth=1 text.heads=2 text.length=96 dit.dim=32 dit.depth=2
    dit.heads=2 dit.patch=2 base.steps=2 base.lr=1e-3 videojam.steps=2 videojam.lr=1e-3 warmup=0
    cooldown=0 ema=0.9 drop_text=0.3 drop_motion=0.2 t_mean=-0.5 sample.steps=4 sample.emulated=20
    sample.w_text=2 sample.w_motion=2 log_every=1 save_every=1 sample_every=0""".split()


def start(*arguments, script="train.py", **environment):
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), **environment)
    return subprocess.Popen([sys.executable, script, *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)


def finished(*processes):
    """(exit status, stdout, stderr) at the end; of several, of the first that failed."""
    ends = [(*process.communicate(timeout=240), process.returncode) for process in processes]
    out, err, status = next((end for end in ends if end[-1]), ends[0])
    return status, out, err


def command(script, *arguments, **environment):
    return finished(start(*arguments, script=script, **environment))


def state(run, stage):
    """The folder of a stage's checkpoints, which has the name of the weights it started from."""
    return next(Path(run, f"{stage}.state").iterdir())


def states(run, stage):
    """The names of a stage's checkpoints, oldest first."""
    return sorted(sorted(os.listdir(state(run, stage))), key=len)


def read_state(run, stage, step):
    """A checkpoint, by torch's own converter: {net, average, exp_avg, exp_avg_sq: {name: w}}."""
    whole = Path(run, "whole.pt")
    dcp_to_torch_save(state(run, stage) / f"step-{step}", whole)
    kinds = {}
    for key, tensor in torch.load(whole, weights_only=True).items():
        kind, _, name = key.partition(".")
        kinds.setdefault(kind, {})[name] = tensor
    whole.unlink()
    return kinds


def read_log(run):
    return [json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()]


def folder(trained, path, *stages):
    """A new run folder with the weights of these finished stages."""
    path.mkdir(parents=True)
    for stage in stages:
        shutil.copy(trained[0] / f"{stage}.pt", path)
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """python train.py with tiny arguments, all four stages: (run folder, stdout). Read only."""
    run = tmp_path_factory.mktemp("trained") / "run"
    status, out, err = command("train.py", *TINY, f"run={run}")
    assert status == 0, err
    return run, out


def silence(patch):
    """train.main in this process without samples and report."""
    def nothing(*args, **kwargs):
        pass
    patch.setattr("train.show_samples", nothing)
    patch.setattr("train.show_reconstruction", nothing)
    patch.setitem(sys.modules, "probe", types.SimpleNamespace(main=nothing))


@pytest.fixture
def quiet(monkeypatch):
    silence(monkeypatch)
