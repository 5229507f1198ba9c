"""videos.py: folders of real videos, their captions, their kept flow. The clips are made here.

Frame k of a "ramp" is grey of brightness 20 + 3 k, so a decoded frame says which one it was.
Tolerance: the codecs return flat grey within 2 of 255, and neighbours differ by 3.
"""
import json
import subprocess
import warnings

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import pytest
import torch

import videos
from videos import VideoFolder

pytestmark = pytest.mark.filterwarnings("ignore:.*without a caption")
RAFT = torch.nn.Linear(2, 2)            # estimate_flow is replaced where it is asked


def ramp(n=24, height=32, width=32):
    return [np.full((height, width, 3), 20 + 3 * k, np.uint8) for k in range(n)]


def noise(n=60):
    """Incompressible, so that half of the bytes is half of the frames."""
    return list(np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8))


def write(path, pictures, fps=12, faststart=False):
    """Faststart puts the index of an mp4 at its beginning, where a cut does not reach it."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".gif":
        imageio.mimwrite(path, pictures, format="GIF", duration=1000 / fps, loop=0)
        return path
    codec = "libvpx" if path.suffix == ".webm" else "libx264"
    options = ["-movflags", "+faststart"] if faststart else []
    imageio.mimwrite(path, pictures, format="FFMPEG", fps=fps, codec=codec, macro_block_size=2,
                     output_params=options)
    return path


def run_ffmpeg(*arguments):
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), *map(str, arguments)], check=True)


def which(video):
    """The numbers of the ramp's frames that a video (3, T, H, W) shows."""
    return ((video.mean(dim=(0, 2, 3)) + 1) * 127.5 - 20).div(3).tolist()


def folder(root, frames=8, fps=12, raft=None):
    return VideoFolder(root, frames, 32, 32, fps, root / "flow", raft)


@pytest.fixture
def estimated(monkeypatch):
    """The windows that RAFT has seen; its answer is (brightness of the window, frame number)."""
    seen = []

    def estimate_flow(video, raft):
        assert video.ndim == 5 and len(video) == 1
        seen.append(video)
        u = torch.full_like(video[:, :1], 100 * video.mean().item())
        v = torch.arange(video.shape[2]).view(1, 1, -1, 1, 1).expand_as(u).float()
        return torch.cat([u, v], dim=1)
    monkeypatch.setattr(videos, "estimate_flow", estimate_flow)
    return seen


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.gif"])
def test_windows_follow_one_another(tmp_path, name):
    """26 frames make three windows of 8; window k shows frames 8 k to 8 k + 7 of the ramp. A gif
    that loops for ever counts once."""
    fps = 12.5 if name == "a.gif" else 12       # a gif counts in hundredths of a second
    write(tmp_path / name, ramp(26), fps)
    clips = folder(tmp_path, fps=fps)
    assert len(clips) == clips.count == 3
    for k in (2, 0, 1):
        clip = clips[k]
        assert clip["video"].shape == (3, 8, 32, 32) and clip["video"].dtype == torch.float32
        assert which(clip["video"]) == pytest.approx(range(8 * k, 8 * k + 8), abs=0.7)
        assert clip["name"] == f"{name}:{8 * k}" and clip["caption"] == ""
    assert len(list(clips)) == 3


@pytest.mark.parametrize("source, fps", [(30, 15), (25, 12), (12, 24)])
def test_windows_are_cut_from_the_resampled_clip(tmp_path, source, fps):
    """Reference: the same frames within one long window; at half the rate, every second frame of
    the ramp. Which of its frames 0 and 1 comes first is ffmpeg's choice."""
    write(tmp_path / "a.mp4", noise(), source)
    n = 60 * fps // source
    whole = folder(tmp_path, frames=n, fps=fps)[0]["video"]
    windows = folder(tmp_path, frames=4, fps=fps)
    assert len(windows) == n // 4
    joined = torch.cat([clip["video"] for clip in windows], dim=1)
    assert torch.equal(joined, whole[:, :joined.shape[1]])
    write(tmp_path / "a.mp4", ramp(60), 30)
    video = folder(tmp_path, frames=28, fps=15)[0]["video"]
    assert which(video)[1:] == pytest.approx(range(2, 56, 2), abs=0.7)


@pytest.mark.parametrize("height, width, sar", [(64, 160, 1), (160, 64, 1), (64, 64, 2)])
def test_picture_covers_the_crop_and_keeps_its_shape(tmp_path, height, width, sar):
    """Wide, tall and anamorphic: a white square (as shown) of half the height at the centre stays
    a square of 16 x 16 at the centre, with a pixel of blur on each side."""
    picture = np.zeros((height, width, 3), np.uint8)
    tall = min(height, width) // 4
    wide = tall // sar
    picture[height // 2 - tall:height // 2 + tall, width // 2 - wide:width // 2 + wide] = 255
    plain = write(tmp_path / "parts" / "plain.avi", [picture] * 8)
    run_ffmpeg("-i", plain, "-vf", f"setsar={sar}", tmp_path / "a.mp4")
    white = folder(tmp_path)[0]["video"][:, 0].mean(dim=0) > 0          # (32, 32)
    assert white[9:23, 9:23].all() and white.sum() <= 18 * 18


def test_one_of_several_streams_is_read(tmp_path):
    """Of two video streams and a sound track, ffmpeg takes the larger picture: the ramp."""
    small = write(tmp_path / "parts" / "small.avi", [np.full((32, 32, 3), 255, np.uint8)] * 24)
    large = write(tmp_path / "parts" / "large.avi", ramp(24, 64, 64))
    run_ffmpeg("-i", small, "-i", large, "-f", "lavfi", "-i", "sine=d=2", "-map", 0, "-map", 1,
               "-map", 2, "-disposition:v", "default", tmp_path / "a.mp4")
    assert which(folder(tmp_path, frames=24)[0]["video"]) == pytest.approx(range(24), abs=0.7)


@pytest.mark.parametrize("late", [0, 0.4])
def test_sound_may_begin_earlier_or_end_later(tmp_path, late):
    """0.4 s of sound without picture: not taken for a cut file, and no frame is doubled."""
    plain = write(tmp_path / "parts" / "plain.avi", ramp(24))
    run_ffmpeg("-itsoffset", late, "-i", plain, "-f", "lavfi", "-i", "sine=d=2.4",
               "-map", 0, "-map", 1, tmp_path / "a.mp4")
    shown = [which(clip["video"]) for clip in folder(tmp_path)]
    assert shown == [pytest.approx(range(k, k + 8), abs=0.7) for k in (0, 8, 16)]


def test_folders_that_are_none(tmp_path):
    """One line each for no folder, a file, a folder without videos."""
    (tmp_path / "notes.doc").write_text("hello")
    for name in ("missing", "notes.doc"):
        with pytest.raises(FileNotFoundError, match=f"no folder at .*{name}.*data.root"):
            folder(tmp_path / name)
    with pytest.raises(ValueError, match="found 0 videos .*mp4"):
        folder(tmp_path)


def test_broken_files_are_skipped_and_named(tmp_path):
    """cut.mp4 has lost its index, which stands at the end; three others keep theirs, or a header,
    that promises 5 s."""
    write(tmp_path / "good.mp4", ramp(16))
    for name, faststart in [("cut.mp4", False), ("faststart.mp4", True), ("matroska.mkv", False)]:
        path = write(tmp_path / name, noise(), faststart=faststart)
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    (tmp_path / "bytes.webm").write_bytes(np.random.default_rng(0).bytes(20000))
    (tmp_path / "empty.mp4").write_bytes(b"")
    path = write(tmp_path / "index.mp4", noise(), faststart=True)
    path.write_bytes(path.read_bytes().partition(b"mdat")[0] + b"mdat")
    names = "bytes.webm, cut.mp4, empty.mp4, faststart.mp4, index.mp4, matroska.mkv"
    write(tmp_path / "short.mp4", ramp(7))
    short = r"1 file\(s\) skipped, under 8 frames at 12 fps: short.mp4"
    with pytest.warns(UserWarning, match=rf"6 file\(s\) skipped, unreadable or .*: {names}"), \
            pytest.warns(UserWarning, match=short):
        clips = folder(tmp_path)
    assert [name for name, _ in clips.windows] == ["good.mp4"] * 2
    (tmp_path / "good.mp4").unlink()
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="7 videos .* no usable one"):
        folder(tmp_path)


def test_a_file_that_changes_underneath_is_an_error(tmp_path):
    """It has lost frames since the folder was opened."""
    write(tmp_path / "a.mp4", ramp(16))
    clips = folder(tmp_path)
    write(tmp_path / "a.mp4", ramp(9))
    with pytest.raises(ValueError, match="a.mp4 is shorter than when"):
        clips[1]


@pytest.mark.parametrize("files", [
    {"metadata.jsonl": '{"file_name": "a.mp4", "text": "a ball,\u2028red"}\n\n'
                       '{"file_name": "b.mp4", "text": "二つの玉"}\n'},
    {"metadata.csv": '\ufefffile_name,text\na.mp4,"a ball,\u2028red"\nb.mp4,二つの玉\n'},
    {"a.txt": "a ball,\u2028red\n", "b.txt": "二つの玉"}], ids=lambda files: list(files)[0])
def test_captions(tmp_path, files):
    """Commas, line separators, other alphabets and a spreadsheet's mark survive; no warning."""
    write(tmp_path / "a.mp4", ramp(8))
    write(tmp_path / "b.mp4", ramp(8))
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        clips = folder(tmp_path)
    assert [clip["caption"] for clip in clips] == clips.prompts() == ["a ball,\u2028red", "二つの玉"]


@pytest.mark.parametrize("name", ["metadata.csv", "a.txt"])
def test_captions_that_are_not_utf8_are_named(tmp_path, name):
    """An accent in Latin-1, in a table and in a text."""
    write(tmp_path / "a.mp4", ramp(8))
    (tmp_path / name).write_bytes("file_name,text\na.mp4,un carr\u00e9 rouge\n".encode("latin-1"))
    with pytest.raises(ValueError, match=f"{name} that are not UTF-8"):
        folder(tmp_path)


def test_captions_that_do_not_match_are_named(tmp_path):
    """A row of the table without its video, and a video without a caption."""
    write(tmp_path / "a.mp4", ramp(8))
    write(tmp_path / "b.mp4", ramp(8))
    rows = [dict(file_name="a.mp4", text="x"), dict(file_name="gone.mp4", text="y")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(UserWarning) as found:
        clips = folder(tmp_path)
    assert [clip["caption"] for clip in clips] == ["x", ""]
    messages = " | ".join(str(w.message) for w in found if w.category is UserWarning)
    assert "not there: gone.mp4 " in messages and "without a caption: b.mp4 " in messages


@pytest.mark.parametrize("table, text, line", [
    ("metadata.jsonl", '{"file_name": "a.mp4", "text": "x"}\n{"file_name": "a.mp4", "te\n', 2),
    ("metadata.jsonl", '\n["a.mp4", "x"]\n', 2),
    ("metadata.jsonl", '{"file_name": "a.mp4", "caption": "x"}\n', 1),
    ("metadata.csv", "file_name,text\na.mp4,x\na.mp4\n", 3),
    ("metadata.csv", "file_name,text\na.mp4,a ball, falling\n", 2),
    ("metadata.csv", "file,text\na.mp4,x\n", 2)])
def test_malformed_captions_name_their_line(tmp_path, table, text, line):
    """Reference: the lines, counted by hand."""
    write(tmp_path / "a.mp4", ramp(8))
    (tmp_path / table).write_text(text)
    with pytest.raises(ValueError, match=rf"line {line} of .*{table}, expected a file_name"):
        folder(tmp_path)


def test_batch_is_the_items_and_flow_is_estimated_once(tmp_path, estimated):
    """Sec. 4.1. Reference: the items, and the stand-in for RAFT, which counts. A second object, as
    after a restart, reads the kept flow. Tolerance: float16 has 11 digits."""
    write(tmp_path / "a.mp4", ramp(24))
    (tmp_path / "a.txt").write_text("brighter and brighter")
    clips = folder(tmp_path, raft=RAFT)
    batch = clips.batch([2, 0, 2])
    video = batch["video"]
    assert torch.equal(video, torch.stack([clips[i]["video"] for i in (2, 0, 2)]))
    assert batch["caption"] == ["brighter and brighter"] * 3
    assert batch["flow"].shape == (3, 2, 8, 32, 32) and len(estimated) == 2
    expected = torch.stack([100 * video.mean((1, 2, 3, 4)), torch.full((3,), 3.5)], dim=1)
    torch.testing.assert_close(batch["flow"].mean((2, 3, 4)), expected, rtol=2 ** -11, atol=1e-3)
    assert torch.equal(batch["flow"][0, 1, :, 3, 5], torch.arange(8.0))
    for again in (clips, folder(tmp_path, raft=RAFT)):
        assert torch.equal(again.batch([2, 0])["flow"], batch["flow"][:2])
    assert len(estimated) == 2 and not list((tmp_path / "flow").glob("*.tmp"))
    with pytest.raises(ValueError, match="no RAFT .* a.mp4:8.*flow.weights"):
        folder(tmp_path).batch([1])


def test_other_content_or_another_raft_is_other_flow(tmp_path, estimated):
    """Kept flow is known by the bytes of the clip and of the RAFT, not by names or dates."""
    other = torch.nn.Linear(2, 2)
    path = tmp_path / "[a]*.mp4"            # letters that mean something to a shell
    for raft, pictures, count in [
            (RAFT, ramp(8), 1), (other, ramp(8), 2), (RAFT, ramp(8), 2), (RAFT, noise(8), 3)]:
        write(path, pictures)
        folder(tmp_path, raft=raft).batch([0])
        assert len(estimated) == count


@pytest.mark.parametrize("how", ["cut", "empty", "bytes"])
def test_torn_flow_is_estimated_again(tmp_path, estimated, how):
    """Reference: the flow before its file was damaged; once mended, it is read again."""
    write(tmp_path / "a.mp4", ramp(8))
    clips = folder(tmp_path, raft=RAFT)
    whole = clips.batch([0])["flow"]
    path = next((tmp_path / "flow").iterdir())
    path.write_bytes(dict(cut=path.read_bytes()[:2000], empty=b"", bytes=b"x" * 500)[how])
    for _ in range(2):
        assert torch.equal(clips.batch([0])["flow"], whole) and len(estimated) == 2
