"""The long form of test_random_kills: kill -9 at twenty random moments, also in the middle of a save, and compare the end bit for bit.

    python tests/kill_often.py [kills] [seed]

Trains a tiny base of 300 steps with a checkpoint at every step: once straight, once killed. Prints where each start resumed. Takes about two minutes.
"""
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from conftest import TINY, finished, read_state, start
from test_scale import kill_often, weights


def main(kills=20, seed=0):
    wanted = [*TINY, "stages=tae,base", "base.steps=300", "save_every=1"]
    with tempfile.TemporaryDirectory() as folder:
        straight, killed = Path(folder, "straight"), Path(folder, "killed")
        status, _, err = finished(start(*wanted, f"run={straight}"))
        assert status == 0, err
        killed.mkdir()
        shutil.copy(straight / "tae.pt", killed)
        resumed = kill_often(killed, wanted, kills, seed)
        status, out, err = finished(start(*wanted, f"run={killed}"))
        assert status == 0 and f"base: resumed at step {resumed[-1]}\n" in out, err
        print(f"{kills} kills; resumed at the steps {', '.join(map(str, resumed))}, each time the newest that was saved")
        one, other = read_state(straight, "base", 300), read_state(killed, "base", 300)
        assert all(torch.equal(w, other[kind][name]) for kind, named in one.items() for name, w in named.items())
        assert all(torch.equal(w, weights(killed, "base")[name]) for name, w in weights(straight, "base").items())
        print("weights, averages and moments after 300 steps: bit for bit those of the run that was not killed")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
