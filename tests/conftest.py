"""What the test files share: the repository on the path, one thread, a config that trains in seconds, one trained run."""
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

# Every size and every number of steps is given, so that no test depends on a default that is still being tuned.
TINY = ["device=cpu", "precision=fp32", "frames=8", "height=16", "width=16", "fps=8", "batch=4", "micro_batch=0", "data.cache=8", "data.root=",
        "flow.sigma=0.1", "t_mean=-0.5", "world.texture=0", "tae.steps=2", "tae.batch=2", "tae.lr=1e-3", "tae.channels=4", "tae.widths=[8,8,16]",
        "tae.blocks=[0,0]", "tae.spatial=4", "tae.temporal=4", "tae.tile=8", "text.dim=16", "text.depth=1", "text.heads=2",
        "text.length=96", "dit.dim=32", "dit.depth=2", "dit.heads=2", "dit.hidden=64", "dit.patch=2", "base.steps=2", "base.lr=1e-3",
        "videojam.steps=2", "videojam.lr=1e-3", "warmup=0", "cooldown=0", "sample.steps=4", "sample.emulated=20", "log_every=1", "save_every=1",
        "sample_every=0"]


def command(*args, **env):
    """A command of the README in a process of its own: (exit status, stdout, stderr)."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default", **env}
    done = subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout, done.stderr


def start(*args, script="train.py", **env):
    """A process of train.py."""
    return subprocess.Popen([sys.executable, *map(str, [script, *args])], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(*processes):
    """(exit status, stdout, stderr) at the end; of several, those of the first that failed, or of the first."""
    outs = [process.communicate(timeout=100) for process in processes]
    return next(((p.returncode, *out) for p, out in zip(processes, outs) if p.returncode), (0, *outs[0]))


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def ranks(n, *args, **kwargs):
    """n processes with the environment that torchrun gives its ranks (torchrun itself takes seconds more)."""
    port = free_port()
    return [start(*args, **kwargs, RANK=str(k), LOCAL_RANK=str(k), WORLD_SIZE=str(n), MASTER_ADDR="localhost", MASTER_PORT=str(port)) for k in range(n)]


def states(run, stage):
    """The names of a stage's checkpoints, oldest first."""
    return sorted((path.name for path in (Path(run) / f"{stage}.state").iterdir()), key=lambda name: int(name.split("-")[1].split(".")[0]))


def read_state(run, stage, step):
    """A checkpoint, read by torch's own converter: {"net", "ema", "exp_avg", "exp_avg_sq": {name: tensor}}."""
    folder = Path(run) / f"{stage}.state" / f"step-{step}"
    dcp_to_torch_save(folder, folder.with_suffix(".whole"))
    try:
        return torch.load(folder.with_suffix(".whole"), weights_only=True)
    finally:
        folder.with_suffix(".whole").unlink()


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """python train.py with tiny arguments, all four stages: (run folder, stdout). Nobody writes into it afterwards."""
    run = tmp_path_factory.mktemp("trained") / "run"
    status, out, err = command("train.py", *TINY, f"run={run}", "stages=tae,base,control,videojam")
    assert status == 0, err
    return run, out
