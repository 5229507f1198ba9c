"""The commands of the README with tiny arguments, and every bad input of the issue: one line, a non-zero exit, nothing overwritten.

Good commands and one bad one per script run in processes of their own; the other bad ones run the same file as `__main__` in this process,
where a traceback is an exception that is not SystemExit.
"""
import hashlib
import json
import re
import runpy
import shutil
import sys
import warnings

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import common
import data
import flow
import sample
import train
from conftest import ROOT, TINY, command, finished, start


def contents(folder):
    """{path: digest} of everything below a folder."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def script(monkeypatch, name, *args, cwd=ROOT):
    """python <name> <args> in this process; returns what it would exit with: None, or the line for stderr."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
    monkeypatch.chdir(cwd)
    try:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    except SystemExit as done:
        return done.code


def one_line(code, name):
    """A message for stderr in one line, which makes the exit status 1."""
    assert isinstance(code, str) and code.startswith(name) and "\n" not in code, code
    return code


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    return tmp_path / "run"


def frames_of(path):
    plugin = "pillow" if path.suffix == ".gif" else "FFMPEG"
    return np.stack(list(iio.imiter(path, plugin=plugin)))


# ---- What the commands do -------------------------------------------------------------------------------------------

def test_train_leaves_weights_samples_and_a_report(trained):
    """python train.py: a weights file per stage, a config, a log, sheets that open, and the report with its numbers and intervals. References:
    the files' own readers; the report's printed share lies in its interval and equals the stored number."""
    run, out = trained
    for stage in ("tae", "base", "control", "videojam"):
        saved = torch.load(run / f"{stage}.pt", weights_only=True)
        assert saved["stage"] == stage and saved["step"] == 2 and json.loads(saved["config"])["dit"]["dim"] == 32
    assert json.loads((run / "config.json").read_text())["height"] == 16
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [(s, k) for s in ("tae", "base", "control", "videojam") for k in (1, 2)]
    sheets = sorted(path.name for path in (run / "samples").glob("*.png"))
    assert any("base" in name for name in sheets) and any("videojam" in name for name in sheets)
    assert all(iio.imread(run / "samples" / name).ndim == 3 for name in sheets)
    numbers = json.loads((run / "report-videojam.json").read_text())
    assert len(data.STRAIGHT) >= 64 and numbers["ground"]["direction"] > 0.95 and numbers["ground"]["colour"] > 0.95
    for words in ("dB", "end-point error", "ground truth", "reconstructions", "samples of videojam", "colour", "direction"):
        assert words in out, words
    assert not {"nan"} & set(out.lower().split())
    assert "train.py" in out or "sample.py" in out, "the run does not end by naming the next commands"


def test_one_prompt_one_mp4(run, tmp_path):
    """python sample.py "a red square moving right" --out x.mp4, in a process: video with motion beside, sheet, settings. Reference: ffmpeg."""
    status, out, err = command("sample.py", "a red square moving right", "--run", run, "--out", tmp_path / "new" / "x.mp4", "--seed", "7", "--device", "cpu")
    assert status == 0, err
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["x.json", "x.mp4", "x.png"]
    frames = frames_of(tmp_path / "new" / "x.mp4")
    assert frames.shape == (8, 256, 512, 3) and iio.immeta(tmp_path / "new" / "x.mp4", plugin="FFMPEG")["fps"] == 8
    assert iio.imread(tmp_path / "new" / "x.png").ndim == 3
    settings = json.loads((tmp_path / "new" / "x.json").read_text())
    assert settings["seed"] == 7 and settings["prompt"] == "a red square moving right" and settings["steps"] == 4
    assert settings["guidance"] == "inner" and settings["stage"] == "videojam" and settings["config"]["dit"]["dim"] == 32
    assert "x.mp4" in out


def test_the_same_command_writes_the_same_clip(run, tmp_path, monkeypatch):
    """The seed and the settings in the JSON make the clip again; another seed makes another. Reference: the sheets' pixels."""
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert script(monkeypatch, "sample.py", "a blue circle falling", "--run", run, "--out", tmp_path / f"{name}.gif", "--seed", seed) is None
    a, b, c = (iio.imread(tmp_path / f"{name}.png") for name in "abc")
    assert (a == b).all() and (a != c).any()


def test_a_gif(run, tmp_path, monkeypatch):
    """--out x.gif: a gif of every frame, motion beside."""
    assert script(monkeypatch, "sample.py", "a red square moving right", "--run", run, "--out", tmp_path / "x.gif") is None
    assert frames_of(tmp_path / "x.gif").shape[:3] == (8, 256, 512) and (tmp_path / "x.json").exists()


def test_count_and_several_prompts(run, tmp_path, monkeypatch):
    """--count 2 with two prompts: four clips with seeds of their own; without --out they land in the run's samples."""
    assert script(monkeypatch, "sample.py", "a red square moving right", "a blue cross growing", "--run", run, "--count", "2", "--seed", "5",
                  "--out", tmp_path / "x.gif") is None
    stored = [json.loads(p.read_text()) for p in sorted(tmp_path.glob("x*.json"))]
    assert len(list(tmp_path.glob("x*.gif"))) == 4 and sorted(s["seed"] for s in stored) == [5, 6, 7, 8]
    assert sorted(s["prompt"] for s in stored) == ["a blue cross growing"] * 2 + ["a red square moving right"] * 2
    before = set(contents(run))
    assert script(monkeypatch, "sample.py", "a red square moving right", "--run", run, "--stage", "base") is None
    new = sorted(set(contents(run)) - before)
    assert [name.rsplit(".")[-1] for name in new] == ["json", "mp4", "png"]
    assert frames_of(run / next(n for n in new if n.endswith("mp4"))).shape == (8, 256, 256, 3)      # the base shows no motion


@pytest.mark.parametrize("options", [["--guidance", "inner", "--w-text", "2", "--w-motion", "1"], ["--guidance", "ip2p"], ["--guidance", "text"],
                                     ["--guidance", "none"], ["--no-motion"], ["--steps", "6", "--motion-steps", "1", "--emulated", "9"], ["--stage", "control"]])
def test_every_option(run, tmp_path, monkeypatch, options):
    """Each guidance and switch runs, and stands in the settings."""
    assert script(monkeypatch, "sample.py", "a red square moving right", "--run", run, "--out", tmp_path / "x.gif", *options) is None
    settings = json.loads((tmp_path / "x.json").read_text())
    names = {"--w-text": "w1", "--w-motion": "w2", "--no-motion": "use_motion"}
    for flag, value in zip(options, [*options[1:], ""]):
        if flag.startswith("--"):
            assert str(settings[names.get(flag, flag[2:].replace("-", "_"))]) in ((value, value + ".0") if flag != "--no-motion" else ("False",))
    assert None not in settings.values()                                        # what was used, not what was typed
    assert frames_of(tmp_path / "x.gif").shape[2] == (256 if "control" in options or "--no-motion" in options else 512)


def test_vbench_layout(run, tmp_path, monkeypatch):
    """--prompts file --out folder: flat mp4 files of the appearance alone, at least 128 px, and prompts.json {file name: prompt}. Reference: the
    list of prompts, ffmpeg; blank lines are no prompts."""
    prompts = ["a red square moving right", "a blue circle falling", "a green cross growing"]
    (tmp_path / "prompts.txt").write_text(f"{prompts[0]}\n\n  {prompts[1]}  \n{prompts[2]}\n")
    assert script(monkeypatch, "sample.py", "--prompts", tmp_path / "prompts.txt", "--run", run, "--out", tmp_path / "vbench", "--count", "2") is None
    names = json.loads((tmp_path / "vbench" / "prompts.json").read_text())
    assert sorted(names.values()) == sorted(prompts * 2)
    assert sorted(p.name for p in (tmp_path / "vbench").iterdir()) == sorted([*names, "prompts.json"])
    for name in names:
        frames = frames_of(tmp_path / "vbench" / name)
        assert frames.shape == (8, 128, 128, 3) and iio.immeta(tmp_path / "vbench" / name, plugin="FFMPEG")["fps"] == 8


def test_a_prompt_longer_than_the_window(run, tmp_path):
    """A prompt of more bytes than text.length is cut, with a warning, and sampled: exit 0."""
    status, out, err = command("sample.py", "a red square moving right " * 5, "--run", run, "--out", tmp_path / "x.gif")
    assert status == 0 and "cut to 95" in err and "Traceback" not in err and (tmp_path / "x.gif").exists()


def test_the_report_alone(run, monkeypatch, capsys):
    """python sample.py --report --stage base prints the numbers of that stage."""
    assert script(monkeypatch, "sample.py", "--report", "--stage", "base", "--run", run) in (None, 0)
    assert "samples of base" in capsys.readouterr().out and (run / "report-base.json").exists()
    before = contents(run)
    assert script(monkeypatch, "sample.py", "--report", "--w-motion", "0", "--seed", "7", "--run", run) in (None, 0)
    numbers = json.loads((run / "report-videojam-w2-0.0-seed-7.json").read_text())
    assert numbers["w2"] == 0 and numbers["seed"] == 7 and numbers["steps"] == 4
    assert {name: digest for name, digest in contents(run).items() if name in before} == before, "a variant overwrote the run's own report"


def test_steps_may_change_on_resume(run, monkeypatch):
    """The number of steps, and logging keys, may change; the stage goes on from where it was."""
    assert script(monkeypatch, "train.py", *TINY, f"run={run}", "stages=videojam", "videojam.steps=3", "log_every=3") is None
    assert torch.load(run / "videojam.pt", weights_only=True)["step"] == 3


def test_plan_prints_and_trains_nothing(tmp_path, monkeypatch, capsys):
    """plan=true prints the sizes and stops (config.yaml): no weights, no state. Reference: the parameters counted on the built net."""
    assert script(monkeypatch, "train.py", *TINY, f"run={tmp_path / 'run'}", "plan=true") in (None, 0)
    assert not list(tmp_path.rglob("*.pt")) and "parameters" in capsys.readouterr().out


# ---- Bad input ------------------------------------------------------------------------------------------------------

def test_bad_input_in_a_process(tmp_path):
    """A mistyped key and a folder without a run, as a user meets them: exit status 1, nothing on stdout, one line on stderr."""
    wrong = {"did you mean 'base.steps'": start("base.stesp=5", f"run={tmp_path / 'x'}", PYTHONWARNINGS="default"),
             "no run folder": start("hello", "--run", tmp_path / "x", script="sample.py", PYTHONWARNINGS="default")}
    for words, process in wrong.items():
        status, out, err = finished(process)
        assert status == 1 and out == "" and len(err.splitlines()) == 1 and words in err, err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("args, words", [
    (["hieght=16"], "did you mean 'height'"), (["frames=many"], "expected a int"), (["height=18"], "does not divide"),
    (["preset=huge"], "expected one of"), (["stages=base,sft"], "unknown stage 'sft'"), (["stages="], "stages"),
    (["device=abacus"], "abacus"), (["dit.dim=48"], "was made with dit.dim=32"), (["seed=1"], "was made with seed=0"),
    (["data.root=nowhere"], "nowhere"), (["base.lr=0.1", "base.steps=9"], "was made with base.lr=0.001")])
def test_a_bad_train_command(run, monkeypatch, args, words):
    """Unknown or mistyped keys, sizes that do not divide, a run folder made with another config: one line, the run as it was. Reference: digests
    of all its files before and after."""
    before = contents(run)
    assert words in one_line(script(monkeypatch, "train.py", *TINY, f"run={run}", *args), "train.py: ")
    assert contents(run) == before


def test_data_shows_what_train_would_see(tmp_path, monkeypatch):
    """`python data.py key=value`: 16 clips, 8 frames over 8 flow pictures each, enlarged to 64 px with a 2 px frame. Reference: the picture's
    first frame, pixel by pixel, against the world's own clip of that prompt."""
    assert script(monkeypatch, "data.py", "height=32", "width=32", "frames=8", cwd=tmp_path) is None
    picture = iio.imread(tmp_path / "world.png")
    assert picture.shape == (16 * 2 * 66, 8 * 66, 3)
    clip = data.MovingShapes(8, 32, 32, split="train").of_prompts([data.PROMPTS[0]])["video"][0, :, 0]
    expected = ((clip + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert (picture[:64:2, :64:2] == expected).all() and (picture[1:64:2, 1:64:2] == expected).all()
    assert "did you mean 'height'" in one_line(script(monkeypatch, "data.py", "hieght=32"), "data.py: ")


@pytest.mark.parametrize("args", [["tae.steps=3"], ["tae.steps=3", "stages=tae"], ["base.steps=3", "stages=base"]])
def test_a_stage_that_others_stand_on_is_not_trained_on(run, monkeypatch, args):
    """More steps for the TAE or the base would leave the later stages' weights without what they were trained on: one line, the run as it was."""
    before = contents(run)
    assert "stand on what it is now" in one_line(script(monkeypatch, "train.py", *TINY, f"run={run}", *args), "train.py: ")
    assert contents(run) == before


def test_latents_of_another_tae_are_refused(run, monkeypatch):
    """Sampling with a TAE other than the one that made the DiT's latents would show noise: one line."""
    saved = torch.load(run / "tae.pt", weights_only=True)
    name = next(iter(saved["weights"]))
    saved["weights"][name] = saved["weights"][name] + 1
    saved["checksum"] = common.checksum(saved["weights"])
    torch.save(saved, run / "tae.pt")
    assert "another tae.pt" in one_line(script(monkeypatch, "sample.py", "a red square moving right", "--run", run), "sample.py: ")


def test_samples_at_intervals(run, monkeypatch):
    """sample_every: a sheet and a clip per interval, and the training is not touched by it. Reference: the weights of the run without."""
    monkeypatch.setattr(train, "finale", lambda *args: None)
    for every, name in ((0, "without"), (1, "with")):
        new = run.with_name(name)
        new.mkdir()
        shutil.copy(run / "tae.pt", new)
        train.main([*TINY, f"run={new}", "stages=base", "base.steps=3", f"sample_every={every}", "log_every=2"])
    assert {"base-1.png", "base-2.mp4", "base-3.png"} <= {p.name for p in (new / "samples").iterdir()}
    a, b = (common.read_weights(run.with_name(name) / "base.pt")["checksum"] for name in ("without", "with"))
    assert a == b


@pytest.fixture
def raft_file(tmp_path):
    """Untrained RAFT-small: enough for a folder of clips."""
    path = tmp_path / "raft_small.pth"
    torch.manual_seed(0)
    torch.save(flow.RAFT("small").state_dict(), path)
    return path


@pytest.mark.parametrize("kind, words", [("missing", "nothing at"), ("empty", "no video"), ("broken", "no usable")])
def test_bad_video_folders(tmp_path, raft_file, monkeypatch, kind, words):
    """A missing folder, one without videos, one whose only video is random bytes: one line, and no run folder is left that would refuse the
    corrected command. Reference: the corrected command's own start, on an existing clip."""
    folder, run = tmp_path / "videos", tmp_path / "run"
    if kind != "missing":
        folder.mkdir()
    if kind == "broken":
        (folder / "clip.mp4").write_bytes(np.random.default_rng(0).bytes(2000))
    line = [*TINY, f"run={run}", "stages=tae", f"flow.weights={raft_file}"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert words in one_line(script(monkeypatch, "train.py", *line, f"data.root={folder}"), "train.py: ")
    assert not run.exists()


def test_a_missing_folder_is_named_before_raft_is_fetched(tmp_path):
    """Without flow.weights RAFT would be downloaded (here the network is a closed port): the missing folder must come first."""
    status, _, err = command("train.py", *TINY, f"run={tmp_path / 'run'}", f"data.root={tmp_path / 'nowhere'}", TORCH_HOME=str(tmp_path),
                             https_proxy="http://127.0.0.1:9", HTTPS_PROXY="http://127.0.0.1:9")
    assert status == 1 and len(err.splitlines()) == 1 and "expected a folder of videos" in err, err


@pytest.mark.parametrize("content, words", [(None, "no file of RAFT weights"), (b"nonsense", "raft.pth")])
def test_bad_raft_weights(tmp_path, monkeypatch, content, words):
    """A missing or damaged RAFT file: one line, no run folder made."""
    (tmp_path / "videos").mkdir()
    iio.imwrite(tmp_path / "videos" / "a.mp4", np.zeros((20, 16, 16, 3), np.uint8), plugin="FFMPEG", fps=8, macro_block_size=2)
    if content:
        (tmp_path / "raft.pth").write_bytes(content)
    line = [*TINY, f"run={tmp_path / 'run'}", f"data.root={tmp_path / 'videos'}", f"flow.weights={tmp_path / 'raft.pth'}"]
    assert words in one_line(script(monkeypatch, "train.py", *line), "train.py: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:.*without a caption")
def test_training_on_a_folder_of_videos(tmp_path, raft_file, monkeypatch):
    """python train.py data.root=videos flow.weights=...: every stage, then a sample. A clip without a caption, real files, RAFT's flow kept."""
    (tmp_path / "videos").mkdir()
    rng = np.random.default_rng(0)
    for n in range(2):
        iio.imwrite(tmp_path / "videos" / f"{n}.mp4", rng.integers(0, 255, (17, 24, 32, 3), dtype=np.uint8), plugin="FFMPEG", fps=8, macro_block_size=2)
    (tmp_path / "videos" / "0.txt").write_text("some noise")
    line = [*TINY, f"run={tmp_path / 'run'}", f"data.root={tmp_path / 'videos'}", f"flow.weights={raft_file}", "batch=2"]
    assert script(monkeypatch, "train.py", *line) is None
    assert len(list((tmp_path / "run" / "flow").glob("*.npy"))) == 4
    assert list((tmp_path / "run" / "samples").glob("videojam*.png"))
    assert script(monkeypatch, "sample.py", "some noise", "--run", tmp_path / "run", "--out", tmp_path / "x.gif") is None


@pytest.mark.parametrize("stage, gone, words", [("videojam", "base.pt", "train the base first"), ("control", "base.pt", "train the base first"),
                                                ("base", "tae.pt", "train the tae first")])
def test_a_missing_stage(run, monkeypatch, stage, gone, words):
    """videojam without a base, base without a TAE: which stage to train first, and how."""
    for name in (gone, f"{stage}.pt"):
        (run / name).unlink(missing_ok=True)
    shutil.rmtree(run / f"{stage}.state", ignore_errors=True)
    before = contents(run)
    assert words in one_line(script(monkeypatch, "train.py", *TINY, f"run={run}", f"stages={stage}"), "train.py: ")
    assert {k: v for k, v in contents(run).items() if k != "config.json"} == {k: v for k, v in before.items() if k != "config.json"}


def test_a_loss_that_explodes(run, monkeypatch):
    """A learning rate of 1e30 makes the loss infinite: stops, names the stage and the step, writes no weights; other stages stay as they are."""
    new = run.with_name("new")
    new.mkdir()
    shutil.copy(run / "tae.pt", new)
    line = script(monkeypatch, "train.py", *TINY, f"run={new}", "stages=base", "base.lr=1e30", "base.steps=20", "save_every=50")
    assert "step" in one_line(line, "train.py: ") and "base" in line and not (new / "base.pt").exists() and not list(new.glob("*.state/*"))
    assert contents(new)["tae.pt"] == contents(run)["tae.pt"]


@pytest.mark.parametrize("args, words", [
    ([], "no prompt"), (["--prompts", "EMPTY"], "no prompt"), (["--prompts", "nowhere.txt"], "no such file"), (["--prompts", "FOLDER"], "FOLDER"),
    (["hello", "--steps", "1"], "schedule"), (["hello", "--steps", "0"], "schedule"), (["hello", "--count", "0"], "--count 0"),
    (["hello", "--device", "abacus"], "abacus"), (["hello", "--device", "cuda:99"], "device=cuda:99"), (["hello", "--out", "FOLDER/v.1"], "without a dot"),
    (["hello", "--out", "EMPTY"], "EMPTY"), (["hello", "--out", "FOLDER/x.txt"], "mp4"), (["hello", "--stage", "base"], "train the base first"),
    (["hello", "--seed", "-1"], None)])
def test_a_bad_sample_command(run, tmp_path, monkeypatch, args, words):
    """Empty prompt lists, impossible schedules, unknown endings and devices, a missing stage: one line, nothing written or changed."""
    (tmp_path / "EMPTY").write_text("\n \n")
    (tmp_path / "FOLDER").mkdir()
    (run / "base.pt").unlink()
    before = contents(tmp_path)
    args = [str(tmp_path / a) if a.split("/")[0] in ("EMPTY", "FOLDER") else a for a in args]
    code = script(monkeypatch, "sample.py", *args, "--run", run)
    if words is None:                                                           # a negative seed may work, or be one line
        assert code is None or one_line(code, "sample.py: ")
        return
    assert words in one_line(code, "sample.py: ")
    assert contents(tmp_path) == before


def test_weights_of_another_shape(run, monkeypatch, tmp_path):
    """A weights file of a wider net in the run: the tensor, found and expected, in one line, for sample.py and for train.py."""
    config = json.loads((run / "config.json").read_text())
    config["dit"]["dim"] = 64
    (run / "config.json").write_text(json.dumps(config))
    before = contents(run)
    assert re.search(r"found \(.*32\).*expected \(.*64\)", one_line(script(monkeypatch, "sample.py", "hello", "--run", run), "sample.py: "))
    line = script(monkeypatch, "train.py", *TINY, f"run={run}", "dit.dim=64", "stages=videojam", "videojam.steps=3")
    assert re.search(r"found \(.*32.*\).*expected \(.*64.*\)", one_line(line, "train.py: "))
    changed = {name for name, digest in contents(run).items() if before.get(name) != digest}
    assert changed <= {"config.json"}
