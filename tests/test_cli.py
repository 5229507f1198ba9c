"""The commands of the README with tiny arguments; bad input is one line and changes nothing.

The scripts run as `__main__` in this process, where a traceback would be an exception other than
SystemExit. References: the files' own readers (torch, ffmpeg, pillow) and digests of all files.
"""
import hashlib
import json
import pathlib
import runpy
import shutil
import sys

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import yaml

import common
import flow
import sample
from conftest import ROOT, TINY, command

RED = "a red square moving right"


def contents(folder):
    """{path: digest} of everything below a folder."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def script(monkeypatch):
    """A function that runs a script -> what it exits with: None or 0 if all is well."""
    def run_script(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as end:
            return end.code
    return run_script


@pytest.fixture
def refused(script):
    """A function that runs a script which must end with one line that has these words."""
    def run_script(words, name, *arguments):
        line = script(name, *arguments)
        assert isinstance(line, str) and "\n" not in line           # Python then exits with 1
        assert line.startswith(f"{name}: ") and words in line
    return run_script


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the trained run, to be spoilt."""
    return pathlib.Path(shutil.copytree(trained[0], tmp_path / "run"))


def frames_of(path):
    plugin = "pillow" if path.suffix == ".gif" else "FFMPEG"
    return np.stack(list(iio.imiter(path, plugin=plugin)))


# -------------------------------------------------------------------------------------------------
# What the commands do


def test_train_leaves_weights_samples_and_a_report(trained):
    """A weights file per stage with its config, a log, sheets, the report, and the next command."""
    run, out = trained
    for stage in common.STAGES:
        saved = torch.load(run / f"{stage}.pt", weights_only=True)
        assert (saved["stage"], saved["step"]) == (stage, 2)
        assert json.loads(saved["config"]) == json.loads((run / "config.json").read_text())
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [(stage, step) for stage in common.STAGES for step in (1, 2)]
    assert [(line["stage"], line["step"]) for line in lines] == steps
    for name in ("reconstruction", "base-2", "control-2", "videojam-2"):
        assert iio.imread(run / f"samples/{name}.png").ndim == 3
        assert len(frames_of(run / f"samples/{name}.mp4")) == 8
    assert json.loads((run / "report.json").read_text())["videojam"]
    assert iio.imread(run / "report.png").ndim == 3
    assert f"--run {run}" in out


def test_one_prompt_one_mp4(script, run, tmp_path, capsys):
    """The video with its motion beside it, a sheet, and the settings on the screen."""
    clip = tmp_path / "new" / "x.mp4"
    assert script("sample.py", RED, "--run", run, "--out", clip, "--device", "cpu") is None
    assert sorted(path.name for path in clip.parent.iterdir()) == ["x.mp4", "x.png"]
    assert frames_of(clip).shape == (8, 256, 512, 3)
    assert iio.immeta(clip, plugin="FFMPEG")["fps"] == 8
    assert iio.imread(clip.with_suffix(".png")).ndim == 3
    out = capsys.readouterr().out
    for word in (str(clip), RED, "'steps': 4", "'w_text': 2.0", "'w_motion': 2.0"):
        assert word in out


def test_the_same_command_writes_the_same_gif(script, run, tmp_path):
    """Bit for bit; another seed makes another clip. The gif has every frame and its motion."""
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        out = tmp_path / f"{name}.gif"
        assert script("sample.py", RED, "--run", run, "--seed", seed, "--out", out) is None
    a, b, c = [(tmp_path / f"{name}.gif").read_bytes() for name in "abc"]
    assert a == b
    assert a != c
    assert frames_of(tmp_path / "a.gif").shape[:3] == (8, 256, 512)


def test_count_and_several_prompts(script, run):
    """--count 2 with two prompts: four different clips, named by prompt and seed, in samples."""
    before = set(contents(run))
    arguments = [RED, "a blue cross growing", "--count", 2, "--seed", 5, "--stage", "base"]
    assert script("sample.py", *arguments, "--run", run) is None
    new = sorted(set(contents(run)) - before)
    names = ["a-blue-cross-growing-7", "a-blue-cross-growing-8",
             "a-red-square-moving-right-5", "a-red-square-moving-right-6"]
    assert new == [f"samples/base-{name}.{end}" for name in names for end in ("mp4", "png")]
    assert len({contents(run)[name] for name in new}) == 8
    assert frames_of(run / new[0]).shape == (8, 256, 256, 3)        # the base predicts no motion


@pytest.mark.parametrize("options, shown, width", [
    ("--guidance inner --w-text 3 --w-motion 1", "'w_text': 3.0, 'w_motion': 1.0", 512),
    ("--guidance ip2p", "'guidance': 'ip2p'", 512),
    ("--guidance text", "'guidance': 'text'", 512),
    ("--guidance none", "'guidance': 'none'", 512),
    ("--no-motion", "'use_motion': False", 256),
    ("--steps 6", "'steps': 6", 512),
    ("--stage control", "'use_motion': False", 256)])
def test_every_option(script, run, tmp_path, capsys, options, shown, width):
    """Each runs and stands in the settings; without motion there is no picture of it."""
    out = tmp_path / "x.gif"
    assert script("sample.py", RED, "--run", run, "--out", out, *options.split()) is None
    assert shown in capsys.readouterr().out
    assert frames_of(out).shape[2] == width


def test_vbench_layout(script, run, tmp_path):
    """--prompts and a folder: flat mp4s of appearance alone, 128 px, and {file name: prompt}."""
    prompts = [RED, "a blue circle falling", "a green cross growing"]
    (tmp_path / "prompts.txt").write_text("\n\n".join(prompts))
    folder = tmp_path / "vbench"
    arguments = ["--prompts", tmp_path / "prompts.txt", "--out", folder, "--count", 2]
    assert script("sample.py", *arguments, "--run", run) is None
    names = json.loads((folder / "prompts.json").read_text())
    assert sorted(names.values()) == sorted(2 * prompts)
    assert set(contents(folder)) == {*names, "prompts.json"}
    for name in names:
        assert frames_of(folder / name).shape == (8, 128, 128, 3)
        assert iio.immeta(folder / name, plugin="FFMPEG")["fps"] == 8


@pytest.mark.parametrize("text, prompts", [
    ("a cat\n\n  a dog \n", ["a cat", "a dog"]),
    ("12. a cat\n13. a dog\n", ["a cat", "a dog"]),
    ("1. 1. a cat\n2. 2. a dog", ["a cat", "a dog"]),
    ("“a cat”\n\n“a dog”", ["a cat", "a dog"]),
    ("12.\na cat\n\n13.\na dog", ["a cat", "a dog"]),
    ("12. 12.\na cat\n13. 13.\na dog", ["a cat", "a dog"]),
    ('9. "a cat"\n10. "a dog"\n', ["a cat", "a dog"]),
    ('1.\n"a sign "stop" at night"', ['a sign "stop" at night']),
    ("1. “a sign “stop” at night”", ["a sign “stop” at night"]),
    ('a dog reads "news"\n"stop" says a sign', ['a dog reads "news"', '"stop" says a sign']),
    ("1. 3 cats, 2.5 dogs\n2. 1984. A street", ["3 cats, 2.5 dogs", "1984. A street"]),
    ("2 cats in 1990\n3 dogs", ["2 cats in 1990", "3 dogs"]),
    ("\ufeffa cat\r\na dog\r\n", ["a cat", "a dog"])])
def test_prompts_as_people_paste_them(tmp_path, text, prompts):
    """Plain or numbered, quoted or not; a prompt keeps its own quotes and digits. By hand."""
    path = tmp_path / "prompts.txt"
    path.write_bytes(text.encode())
    assert sample.read_prompts(path) == prompts


@pytest.mark.parametrize("name", ["train", "data", "videos", "sample", "probe"])
def test_help(script, capsys, name):
    """--help prints the docstring and every key (or flag), and the exit status is 0."""
    assert not script(f"{name}.py", "--help")
    out = capsys.readouterr().out
    assert (ROOT / f"{name}.py").read_text().split('"""')[1].splitlines()[0] in out
    words = ["--run", "--seed", "--device", "--w-text"]
    if name in ("train", "data", "videos"):
        words = common.flatten(common.load_config(["run=nowhere"]))
    for word in words:
        assert word.split(".")[-1] in out


@pytest.mark.filterwarnings("ignore:.*without a caption")
def test_training_on_a_folder_of_videos(script, tmp_path, capsys):
    """Two mp4s, one caption, an untrained RAFT: every stage, then a clip of that caption."""
    folder, run = tmp_path / "videos", tmp_path / "run"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        noise = rng.integers(0, 255, (17, 24, 32, 3), dtype=np.uint8)
        iio.imwrite(folder / f"{name}.mp4", noise, plugin="FFMPEG", fps=8, macro_block_size=2)
    (folder / "a.txt").write_text("some noise")
    torch.save(flow.RAFT("small").state_dict(), tmp_path / "raft.pth")
    settings = [f"data.root={folder}", f"flow.weights={tmp_path / 'raft.pth'}", "batch=2"]
    assert script("train.py", *TINY, f"run={run}", *settings) is None
    assert len(list((run / "flow").glob("*.npy"))) == 4             # two windows of each video
    assert (run / "samples/videojam-2.mp4").exists()
    assert "videojam-2.mp4 and .png:  | some noise\n" in capsys.readouterr().out
    out = tmp_path / "x.gif"
    assert script("sample.py", "some noise", "--run", run, "--out", out) is None
    assert out.exists()


# -------------------------------------------------------------------------------------------------
# The config


def test_every_preset_is_sound():
    """It loads, says its own name, and has the default's keys and types and no others."""
    document = yaml.safe_load((ROOT / "config.yaml").read_text())
    default = common.flatten(document["default"])
    assert {"tiny", "hour", "videos", "small", "4b", "30b"} <= set(document["presets"])
    for preset in document["presets"]:
        flat = common.flatten(common.load_config([f"preset={preset}", "run=nowhere"]))
        assert flat["preset"] == preset
        assert flat.keys() == default.keys()
        for key, value in flat.items():
            assert type(value) is type(default[key]), key


def test_a_run_folder_knows_its_config(script, run, quiet, capsys):
    """`run=` alone skips what is finished, or goes on; it remembers what was changed later."""
    before = contents(run)
    assert script("train.py", f"run={run}") is None
    after = contents(run)
    changed = [name for name in after if after[name] != before.get(name)]
    assert changed == ["config.json"]                               # the copy has another path
    assert capsys.readouterr().out.count("skipped") == 4
    assert script("train.py", f"run={run}", "videojam.steps=3", "log_every=3") is None
    assert "videojam: 0.06 M parameters, step 2 to 3" in capsys.readouterr().out
    assert torch.load(run / "videojam.pt", weights_only=True)["step"] == 3
    config = common.load_config([f"run={run}"])
    assert (config.videojam.steps, config.log_every, config.dit.dim) == (3, 3, 32)


def test_a_run_is_what_it_was_made_with(run):
    """Steps, rates, memory and logging keys may change; any other key must agree (DESIGN's list).
    Reference: each key in turn with another value."""
    free = """device stages micro_batch tae.micro_batch checkpointing compile tae.steps tae.lr
        base.steps base.lr videojam.steps videojam.lr text.lr clip log_every save_every save_minutes
        sample_every""".split()
    other = {int: "88", float: "0.88", bool: "true", list: "[88]", str: "hour"}
    words = dict(stages="tae", compile="always")
    made = common.flatten(common.load_config([f"run={run}"]))
    for key in made.keys() - {"run"}:
        argument = f"{key}={words.get(key, other[type(made[key])])}"
        if key in free:
            config = common.flatten(common.load_config([f"run={run}", argument]))
            assert config[key] != made[key]
        else:
            with pytest.raises(ValueError, match=f"was made with {key}="):
                common.load_config([f"run={run}", argument])


# -------------------------------------------------------------------------------------------------
# Bad input


def test_bad_input_in_a_process_of_its_own(tmp_path):
    """Exit status 1, nothing on stdout, one line on stderr, nothing written."""
    status, out, err = command("train.py", "base.stesp=5", f"run={tmp_path / 'run'}")
    assert (status, out) == (1, "")
    assert err == ("train.py: found 'base.stesp=5', expected key=value: "
                   "did you mean base.steps=...? --help prints all keys\n")
    assert not (tmp_path / "run").exists()


BAD_KEYS = """hieght=16: did you mean height
    hello: expected key=value
    preset=huge: expected one of tiny
    frames=8.5: frames=8.5
    tae.widths=8: tae.widths=8
    checkpointing=yes: checkpointing=yes
    precision=fp64: auto, bf16 or fp32
    compile=maybe: auto, always or never
    stages=base,sft: found stages=base,sft
    stages=: found stages=
    height=18: a multiple of 8
    dit.heads=3: a multiple of 3
    tae.batch=3: a multiple of 2
    tae.tile=12: a multiple of 8
    tae.widths=[8,16]: widths
    batch=0: 1 or more
    dit.heads=0: 1 or more
    frames=many: frames=many
    base.steps=-1: 0 or more
    base.lr=-1: 0 or more
    base.lr=NaN: a finite number
    t_mean=Infinity: a finite number
    tae.widths=[0,8,16]: 1 or more
    drop_text=1.5: at most 1
    sample.steps=21: 2 to emulated
    device=abacus: device=abacus
    data.root=nowhere: nowhere"""


@pytest.mark.parametrize("case", BAD_KEYS.split("\n"))
def test_a_bad_key(refused, tmp_path, case):
    """One line names what was found and expected; no run folder is made."""
    argument, words = case.strip().split(": ")
    refused(words, "train.py", *TINY, f"run={tmp_path / 'run'}", argument)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["data.py", "videos.py"])
def test_a_bad_key_of_another_script(refused, name):
    refused("did you mean height", name, "hieght=16")


@pytest.mark.parametrize("words, arguments", [
    ("was made with dit.dim=32, found dit.dim=48", ["dit.dim=48"]),
    ("tae.pt has 2 steps, expected 3, but base.pt, control.pt, videojam.pt", ["tae.steps=3"]),
    ("base.pt has 2 steps, expected 3", ["base.steps=3", "stages=base"])])
def test_a_finished_run_is_not_spoilt(refused, run, words, arguments):
    """Other sizes, or more steps for a stage that others stand on: refused, every file kept."""
    before = contents(run)
    refused(words, "train.py", f"run={run}", *arguments)
    assert contents(run) == before


@pytest.mark.parametrize("gone, stage", [("tae", "base"), ("base", "control"),
                                         ("base", "videojam")])
def test_a_missing_stage_below(refused, run, gone, stage):
    """The line says which stage to train first, and how."""
    for name in (gone, stage):
        (run / f"{name}.pt").unlink()
        shutil.rmtree(run / f"{name}.state")
    refused(f"{gone}.pt is missing; train it: python train.py run={run} stages={gone}",
            "train.py", f"run={run}", f"stages={stage}")
    assert not (run / f"{stage}.pt").exists()


def test_a_damaged_config(refused, run):
    for text in ('{"preset": "ti', "null"):
        (run / "config.json").write_text(text)
        refused("config.json is no config", "train.py", f"run={run}")
        refused("config.json is no config", "sample.py", RED, "--run", run)


@pytest.mark.parametrize("words, arguments", [
    ("no prompt", []),
    ("no prompt", ["--prompts", "EMPTY"]),
    ("nowhere.txt", ["--prompts", "nowhere.txt"]),
    ("FOLDER", ["--prompts", "FOLDER"]),
    ("schedule", [RED, "--steps", "1"]),
    ("--count 0", [RED, "--count", "0"]),
    ("device=abacus", [RED, "--device", "abacus"]),
    ("expected .mp4, .gif", [RED, "--out", "FOLDER/x.txt"]),
    ("EMPTY", [RED, "--out", "EMPTY"]),
    ("no run folder", [RED, "--run", "nowhere"]),
    ("base.pt is missing; train it", [RED, "--stage", "base"])])
def test_a_bad_sample_command(refused, run, tmp_path, monkeypatch, words, arguments):
    """One line, and nothing written or changed."""
    monkeypatch.chdir(tmp_path)
    pathlib.Path("EMPTY").write_text("\n \n")
    pathlib.Path("FOLDER").mkdir()
    (run / "base.pt").unlink()
    before = contents(tmp_path)
    refused(words, "sample.py", "--run", run, *arguments)
    assert contents(tmp_path) == before
