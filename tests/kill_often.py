"""kill -9 a training run twenty times, also while it saves, and compare the end bit for bit.

    python tests/kill_often.py [kills] [seed]           # about two minutes

A tiny base of 300 steps with a checkpoint at every step: once straight, once killed.
"""
import sys
import tempfile
from pathlib import Path

from conftest import TINY, finished, folder, read_state, start
from test_scale import assert_equal, kill_often, weights


def main(kills=20, seed=0):
    arguments = [*TINY, "base.steps=300", "log_every=100"]
    with tempfile.TemporaryDirectory() as root:
        straight, killed = Path(root, "straight"), Path(root, "killed")
        status, _, err = finished(start(*arguments, "stages=tae,base", f"run={straight}"))
        assert status == 0, err
        folder([straight], killed, "tae")
        steps = kill_often(killed, [*arguments, "stages=base"], kills, seed)
        print(f"{kills} kills; each start went on from the newest step saved:", *steps)
        status, _, err = finished(start(*arguments, "stages=base", f"run={killed}"))
        assert status == 0, err
        assert_equal(weights(killed, "base"), weights(straight, "base"))
        other = read_state(straight, "base", 300)
        for kind, tensors in read_state(killed, "base", 300).items():
            assert_equal(tensors, other[kind])
        print("weights, averages and moments are bit for bit those of the run without kills")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
