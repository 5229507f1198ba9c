"""Folders of real videos. The clips are made here: frame k of a "ramp" is grey of brightness 20 + 3 k, so that a decoded
frame says which one it was. Tolerance: the codecs returned flat grey within 2 of 255 when measured; neighbours differ by 3."""
import json
import subprocess
import sys
import warnings
from pathlib import Path

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import videos  # noqa: E402
from videos import VideoFolder  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*without a caption")
RAFT = torch.nn.Linear(2, 2)                          # the counting estimate_flow below does not look inside


def ramp(n=24, height=32, width=32):
    return [np.full((height, width, 3), 20 + 3 * k, np.uint8) for k in range(n)]


def noise(n=60):
    """Incompressible, so that half of the bytes is half of the frames."""
    return list(np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8))


def write(path, pictures, fps=12, faststart=False):
    if path.suffix == ".gif":
        imageio.mimwrite(path, pictures, format="GIF", duration=1000 / fps, loop=0)    # loop=0: for ever
        return path
    codec = ["-deadline", "realtime", "-b:v", "1M"] if path.suffix == ".webm" else ["-movflags", "+faststart"] if faststart else []
    with imageio.get_writer(path, format="FFMPEG", fps=fps, macro_block_size=2, output_params=codec,
                            codec="libvpx" if path.suffix == ".webm" else "libx264") as writer:
        for picture in pictures:
            writer.append_data(picture)
    return path


def which(video):
    """Numbers of the ramp's frames in video (3, T, H, W)."""
    return ((video.mean(dim=(0, 2, 3)) + 1) * 127.5 - 20).div(3).tolist()


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * share)])


@pytest.fixture
def estimated(monkeypatch):
    """Counts the windows that RAFT sees; its flow is (first frame's brightness, frame number), so windows differ."""
    seen = []

    def estimate_flow(video, raft):
        assert video.ndim == 5 and len(video) == 1
        seen.append(video)
        steps = torch.arange(video.shape[2]).view(1, 1, -1, 1, 1).expand(1, 1, *video.shape[2:]).float()
        return torch.cat([video.mean() * 100 + 0 * steps, steps], dim=1)

    monkeypatch.setattr(videos, "estimate_flow", estimate_flow)
    return seen


@pytest.mark.parametrize("ending", ["mp4", "mkv", "webm", "gif"])
def test_windows_follow_one_another(tmp_path, ending):
    """26 frames make three windows of 8, and window k holds the ramp's frames 8 k to 8 k + 7. A gif that loops for ever counts once."""
    fps = 12.5 if ending == "gif" else 12            # a gif counts in hundredths of a second: 12 would be 8.33 of them
    write(tmp_path / f"a.{ending}", ramp(26), fps)
    clips = VideoFolder(tmp_path, 8, 32, 32, fps)
    assert len(clips) == 3
    for k in (2, 0, 1):
        assert clips[k]["video"].shape == (3, 8, 32, 32) and clips[k]["video"].dtype == torch.float32
        assert which(clips[k]["video"]) == pytest.approx(range(8 * k, 8 * k + 8), abs=0.7)
        assert clips[k]["name"] == f"a.{ending}:{8 * k}" and clips[k]["caption"] == ""
    for i in (3, -1):
        with pytest.raises(IndexError, match=rf"{i}.*0 to 2"):
            clips[i]
    assert len(list(clips)) == 3


@pytest.mark.parametrize("source,fps", [(30, 15), (25, 12), (12, 24)])
def test_windows_are_cut_from_the_resampled_clip(tmp_path, source, fps):
    """A window is the same whether it is decoded alone or within one long window; at half the rate every second frame is left."""
    write(tmp_path / "a.mp4", noise(), source)
    n = 60 * fps // source
    whole, windows = VideoFolder(tmp_path, n, 32, 32, fps), VideoFolder(tmp_path, 4, 32, 32, fps)
    assert len(windows) == n // 4
    joined = torch.cat([windows[k]["video"] for k in range(len(windows))], dim=1)
    assert torch.equal(joined, whole[0]["video"][:, :joined.shape[1]])
    write(tmp_path / "a.mp4", ramp(60), 30)
    # 0 and 1 both round to slot 0 or 1: which of the two opens the clip is ffmpeg's choice, from there on it is even ones.
    assert which(VideoFolder(tmp_path, 28, 32, 32, 15)[0]["video"])[1:] == pytest.approx(range(2, 56, 2), abs=0.7)


def test_picture_covers_the_crop_and_keeps_its_shape(tmp_path):
    """Wide, tall and anamorphic clips, a white square of half the height (as shown) at the centre: it stays square and centred."""
    for name, height, width, sar in (("wide", 64, 160, 1), ("tall", 160, 64, 1), ("anamorphic", 64, 64, 2)):
        picture = np.zeros((height, width, 3), np.uint8)
        tall, wide = min(height, width) // 4, min(height, width) // 4 // sar
        picture[height // 2 - tall:height // 2 + tall, width // 2 - wide:width // 2 + wide] = 255
        plain = write(tmp_path / "plain.avi", [picture] * 8)
        run_ffmpeg("-i", plain, "-vf", f"setsar={sar}", tmp_path / f"{name}.mp4")
        plain.unlink()
    clips = VideoFolder(tmp_path, 8, 32, 32, 12)
    assert len(clips) == 3
    for clip in clips:
        white = clip["video"][:, 0].mean(dim=0) > 0                # (32, 32)
        assert white[9:23, 9:23].all() and white.sum() <= 18 * 18, clip["name"]         # 16 x 16, a pixel of blur on each side


def run_ffmpeg(*arguments):
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)], check=True)


def test_one_of_several_streams_is_read(tmp_path):
    """Two video streams, both marked as default, and a sound track: of 32x32 white and the 64x64 ramp, ffmpeg takes the larger."""
    small = write(tmp_path / "small.avi", [np.full((32, 32, 3), 255, np.uint8)] * 24)
    large = write(tmp_path / "large.avi", ramp(24, 64, 64))
    run_ffmpeg("-i", small, "-i", large, "-f", "lavfi", "-i", "sine=d=2", "-map", 0, "-map", 1, "-map", 2, "-disposition:v", "default", tmp_path / "a.mp4")
    small.unlink(), large.unlink()
    assert which(VideoFolder(tmp_path, 24, 16, 16, 12)[0]["video"]) == pytest.approx(range(24), abs=0.7)


@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.csv", "txt"])
def test_captions(tmp_path, table):
    captions = {"a.mp4": "a red ball,\u2028moving left", "b.mp4": "二つの玉"}
    for name in captions:
        write(tmp_path / name, ramp(8))
    if table == "metadata.jsonl":
        rows = [json.dumps({"file_name": n, "text": c}, ensure_ascii=False) for n, c in captions.items()]
        (tmp_path / table).write_text("\n\n".join(rows) + "\n", encoding="utf-8")
    elif table == "metadata.csv":
        rows = [f'{n},"{c}"' for n, c in captions.items()]
        (tmp_path / table).write_text("\n".join(["file_name,text", *rows]), encoding="utf-8-sig")
    else:
        for n, c in captions.items():
            (tmp_path / n).with_suffix(".txt").write_text(c + "\n", encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)               # nothing to warn of
        assert [clip["caption"] for clip in VideoFolder(tmp_path, 8, 32, 32, 12)] == list(captions.values())


@pytest.mark.parametrize("name", ["metadata.csv", "a.txt"])
def test_captions_that_are_not_utf8_are_named(tmp_path, name):
    write(tmp_path / "a.mp4", ramp(8))
    (tmp_path / name).write_bytes("file_name,text\na.mp4,un carr\u00e9 rouge\n".encode("latin-1"))
    with pytest.raises(ValueError, match=f"{name} that are not UTF-8"):
        VideoFolder(tmp_path, 8, 32, 32, 12)


def test_captions_that_do_not_match_are_named(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write(tmp_path / name, ramp(8))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.mp4", "text": "x"}\n{"file_name": "gone.mp4", "text": "y"}\n')
    with pytest.warns(UserWarning) as found:
        clips = VideoFolder(tmp_path, 8, 32, 32, 12)
    assert [clip["caption"] for clip in clips] == ["x", ""]
    messages = [str(w.message) for w in found if w.category is UserWarning]     # imageio_ffmpeg adds ResourceWarnings of its own
    assert len(messages) == 2
    messages = " | ".join(messages)
    assert "1 file(s) named in" in messages and "not there: gone.mp4" in messages
    assert "1 file(s) without a caption: b.mp4" in messages


@pytest.mark.parametrize("table,text,line", [
    ("metadata.jsonl", '{"file_name": "a.mp4", "text": "x"}\n{"file_name": "a.mp4", "te\n', 2),
    ("metadata.jsonl", '\n["a.mp4", "x"]\n', 2), ("metadata.jsonl", '{"file_name": "a.mp4", "caption": "x"}\n', 1),
    ("metadata.csv", "file_name,text\na.mp4,x\na.mp4\n", 3), ("metadata.csv", "file_name,text\na.mp4,a ball, falling\n", 2),
    ("metadata.csv", "file,text\na.mp4,x\n", 2)])
def test_malformed_captions_name_their_line(tmp_path, table, text, line):
    write(tmp_path / "a.mp4", ramp(8))
    (tmp_path / table).write_text(text)
    with pytest.raises(ValueError, match=rf"line {line} of .*{table}.*expected"):
        VideoFolder(tmp_path, 8, 32, 32, 12)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="found nothing at .*missing.*data.root"):
        VideoFolder(tmp_path / "missing", 8, 32, 32, 12)
    (tmp_path / "notes.doc").write_text("hello")
    with pytest.raises(FileNotFoundError, match="found a file at .*notes.doc.*data.root"):
        VideoFolder(tmp_path / "notes.doc", 8, 32, 32, 12)
    with pytest.raises(ValueError, match="no video .*mp4"):
        VideoFolder(tmp_path, 8, 32, 32, 12)


def test_broken_files_are_skipped_and_named(tmp_path):
    """Five ways to be broken. cut.mp4 has lost its index (the moov box, at the end); the others keep a header that promises 5 s."""
    write(tmp_path / "good.mp4", ramp(16))
    cut(write(tmp_path / "cut.mp4", noise()), 0.5)
    cut(write(tmp_path / "faststart.mp4", noise(), faststart=True), 0.5)
    cut(write(tmp_path / "matroska.mkv", noise()), 0.5)
    (tmp_path / "bytes.webm").write_bytes(np.random.default_rng(0).bytes(20000))
    (tmp_path / "empty.mp4").write_bytes(b"")
    headless = write(tmp_path / "moov_only.mp4", noise(), faststart=True)
    cut(headless, (headless.read_bytes().index(b"mdat") + 8) / headless.stat().st_size)
    with pytest.warns(UserWarning, match=r"6 file\(s\) skipped, unreadable or shorter than the header says: "
                      "bytes.webm, cut.mp4, empty.mp4, faststart.mp4, matroska.mkv, moov_only.mp4"):
        clips = VideoFolder(tmp_path, 8, 32, 32, 12)
    assert [name for name, _ in clips.windows] == ["good.mp4"] * 2
    (tmp_path / "good.mp4").unlink()
    with pytest.warns(UserWarning, match="unreadable"), pytest.raises(ValueError, match="no usable one among 6"):
        VideoFolder(tmp_path, 8, 32, 32, 12)


def test_short_clips_are_skipped_and_named(tmp_path):
    write(tmp_path / "long.mp4", ramp(16))
    write(tmp_path / "short.mp4", ramp(15))
    with pytest.warns(UserWarning, match=r"1 file\(s\) skipped, shorter than 16 frames at 12 fps: short.mp4"):
        assert len(VideoFolder(tmp_path, 16, 32, 32, 12)) == 1
    with pytest.warns(UserWarning, match="shorter"), pytest.raises(ValueError, match="no usable one among 2 .*17 frames"):
        VideoFolder(tmp_path, 17, 32, 32, 12)


def test_sound_may_begin_earlier_and_end_later(tmp_path):
    """0.4 s of sound before or behind the picture: no truncation, and no frame is doubled to fill the time, in no window."""
    plain = write(tmp_path / "plain.avi", ramp(24))
    for name, late in (("early", 0), ("late", 0.4)):
        run_ffmpeg("-itsoffset", late, "-i", plain, "-f", "lavfi", "-i", "sine=d=2.4", "-map", 0, "-map", 1, tmp_path / f"{name}.mp4")
    plain.unlink()
    clips = VideoFolder(tmp_path, 8, 32, 32, 12)
    assert [which(clip["video"]) for clip in clips] == [pytest.approx(range(k, k + 8), abs=0.7) for k in (0, 8, 16)] * 2


def test_a_file_that_changes_underneath_is_an_error(tmp_path):
    clips = VideoFolder(write(tmp_path / "a.mp4", ramp(16)).parent, 8, 32, 32, 12)
    write(tmp_path / "a.mp4", ramp(9))
    with pytest.raises(RuntimeError, match="a.mp4 shorter than when"):
        clips[1]


def test_batch_is_the_items_and_flow_is_estimated_once(tmp_path, estimated):
    """The fake RAFT counts. A second object, as after a restart, reads the stored flow; without a RAFT there is none."""
    write(tmp_path / "a.mp4", ramp(24))
    (tmp_path / "a.txt").write_text("brighter and brighter")
    make = lambda raft: VideoFolder(tmp_path, 8, 32, 32, 12, tmp_path / "flow", raft)
    clips = make(RAFT)
    batch = clips.batch([2, 0, 2])
    assert torch.equal(batch["video"], torch.stack([clips[i]["video"] for i in (2, 0, 2)]))
    assert batch["caption"] == ["brighter and brighter"] * 3
    assert batch["flow"].shape == (3, 2, 8, 32, 32) and batch["flow"].dtype == torch.float32 and len(estimated) == 2
    # float16 has 11 digits: a relative error of 2**-12 at most, and whole frame numbers exactly
    torch.testing.assert_close(batch["flow"][:, 0].mean(dim=(1, 2, 3)), batch["video"].mean(dim=(1, 2, 3, 4)) * 100, rtol=2**-11, atol=1e-3)
    assert torch.equal(batch["flow"][0, 1, :, 3, 5], torch.arange(8.0))

    for again in (clips, make(RAFT)):
        assert torch.equal(again.batch([2, 0])["flow"], batch["flow"][:2])
    assert len(estimated) == 2 and not list((tmp_path / "flow").glob("*.tmp"))
    clips.batch([1])                                   # window 1 was never seen
    assert len(estimated) == 3
    with pytest.raises(ValueError, match="a.mp4:8 .*flow.weights"):
        make(None).batch([1])


def test_other_content_or_another_raft_is_other_flow(tmp_path, estimated):
    make = lambda raft: VideoFolder(tmp_path, 8, 32, 32, 12, tmp_path / "flow", raft)
    write(tmp_path / "[a]*.mp4", ramp(8))              # a name with letters that mean something to a shell
    make(RAFT).batch([0]), make(torch.nn.Linear(2, 2)).batch([0])
    assert len(estimated) == 2
    write(tmp_path / "[a]*.mp4", noise(8))
    make(RAFT).batch([0])
    assert len(estimated) == 3
    make(RAFT).batch([0])
    assert len(estimated) == 3


@pytest.mark.parametrize("spoil", [lambda path: cut(path, 0.5), lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"x" * 500),
                                   lambda path: np.save(path, np.zeros((2, 8, 16, 16), np.float16))])
def test_torn_flow_is_estimated_again(tmp_path, estimated, spoil):
    write(tmp_path / "a.mp4", ramp(8))
    clips = VideoFolder(tmp_path, 8, 32, 32, 12, tmp_path / "flow", RAFT)
    whole = clips.batch([0])["flow"]
    path, = (tmp_path / "flow").iterdir()
    spoil(path)
    assert torch.equal(clips.batch([0])["flow"], whole) and len(estimated) == 2
    assert torch.equal(clips.batch([0])["flow"], whole) and len(estimated) == 2
