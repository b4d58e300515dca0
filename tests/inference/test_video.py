"""Times, holes and ends of videos, and drawn videos that browsers play."""

import struct

import cv2
import numpy as np
import pytest
from PIL import Image

from detclipv2_jax.common import pictures
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.inference.video import Video, is_animation
from detclipv2_jax.inference.video_container import is_cut_off
from detclipv2_jax.inference.video_writer import video_writer

SHADES = (10, 60, 110, 160, 210)


def write(path, code, count=20, size=(64, 48)):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), 10, size)
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 40, (*size[::-1], 3), np.uint8)
        writer.write(noise + np.uint8(SHADES[number % 5]))
    writer.release()
    return path


def times_of(video):
    return [None if seconds is None else round(seconds, 3) for _, seconds in video.timed()]


@pytest.mark.parametrize(
    ("name", "code"), [("a.mp4", "mp4v"), ("a.avi", "MJPG"), ("a.webm", "VP80")]
)
def test_whole_videos_have_no_problem(tmp_path, name, code):
    video = Video(write(tmp_path / name, code))
    assert times_of(video) == [round(n / 10, 3) for n in range(20)]
    assert video.problem is None and video.rate == video.grid_rate == 10
    assert not is_cut_off(video.path)


@pytest.mark.parametrize(
    ("name", "code"), [("a.avi", "MJPG"), ("a.webm", "VP80"), ("a.flv", "FLV1"), ("a.wmv", "WMV2")]
)
def test_videos_that_are_cut_off(tmp_path, name, code):
    path = write(tmp_path / name, code)
    assert not is_cut_off(path) and not (list(video := Video(path)) and video.problem)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    video = Video(path)
    count = len(list(video))
    assert 0 < count < 20 and is_cut_off(path)
    told = f"{count} of the 20 frames" if code == "MJPG" else f"{count} frames of it"
    assert told in video.problem and "cut off" in video.problem


@pytest.mark.parametrize("name", ["a.mp4", "a.mov"])
def test_videos_whose_index_is_cut_off(tmp_path, name):
    path = write(tmp_path / name, "mp4v")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"cannot be read as a video \(the file is cut off\)\.$"):
        Video(path)


def test_a_hole_in_the_middle(tmp_path):
    path = write(tmp_path / "a.avi", "MJPG")
    content = bytearray(path.read_bytes())
    start = content.index(b"movi")
    at = [i for i in range(start, len(content) - 4) if content[i : i + 4] == b"00dc"][5]
    length = struct.unpack("<I", content[at + 4 : at + 8])[0]
    content[at + 8 : at + 8 + length] = bytes(length)
    path.write_bytes(content)
    video = Video(path)
    times = times_of(video)
    assert video.problem == "19 of the 20 frames that the file claims could be decoded"
    assert times == [round(n / 10, 3) for n in range(20) if n != 5]


def test_a_rotated_video_is_upright(tmp_path):
    path = write(tmp_path / "a.mp4", "mp4v")
    content = bytearray(path.read_bytes())
    matrix = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    quarter = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    at = content.index(matrix, content.index(b"tkhd"))
    content[at : at + 36] = quarter
    path.write_bytes(content)
    assert next(iter(Video(path))).shape == (64, 48, 3)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "avif"])
def test_animations_have_the_times_of_their_frames(tmp_path, suffix):
    first, *rest = [Image.new("RGB", (40, 30), (shade, 0, 0)) for shade in SHADES[:4]]
    path = tmp_path / f"a.{suffix}"
    durations = [100, 2000, 100, 100]
    first.save(path, save_all=True, append_images=rest, duration=durations, lossless=True)
    video = Video(path)
    assert times_of(video) == [0, 0.1, 2.1, 2.2] and video.frames == 4 and video.problem is None
    assert video.rate == pytest.approx(4 / 2.3) and is_animation(path)
    with video_writer(tmp_path / "out.webm", video.grid_rate) as add:
        for frame, seconds in video.timed():
            add(frame, seconds)
    drawn = list(Video(tmp_path / "out.webm").timed())
    reds = [frame[..., 0].mean() for frame, _ in drawn]
    shown = [int(np.argmin(np.abs(np.subtract(SHADES[:4], red)))) for red in reds]
    starts = [round(drawn[shown.index(n)][1], 2) for n in range(4)]
    assert starts == [0, 0.1, 2.1, 2.2]


@pytest.mark.parametrize("suffix", ["webp", "avif", "gif"])
def test_a_damaged_animation_tells_what_is_missing(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 255, (4, 30, 40, 3), np.uint8)
    first, *rest = map(Image.fromarray, noise)
    path = tmp_path / f"a.{suffix}"
    first.save(path, save_all=True, append_images=rest, duration=100)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 600] = bytes(600)
    if suffix == "gif":
        del content[middle:]
    path.write_bytes(content)
    try:
        video = Video(path)
        shown = len(list(video))
    except UserError as error:
        assert str(error).startswith(f"{path}: cannot be read as an animation (")
    else:
        assert shown < 4 and f"{shown} of the" in video.problem


def test_an_animation_that_would_fill_the_memory_is_refused(tmp_path):
    path = tmp_path / "a.gif"
    first, second = Image.new("L", (9, 9)), Image.new("L", (9, 9), 9)
    first.save(path, save_all=True, append_images=[second])
    content = bytearray(path.read_bytes())
    content[6:10] = struct.pack("<HH", 9000, 9000)  # of the whole picture
    path.write_bytes(content)
    assert not is_animation(path)
    with pytest.raises(UserError, match="9,000x9,000 pixels in a file of"):
        Video(path)


def test_an_animation_is_turned_as_a_photo(tmp_path):
    path, exif = tmp_path / "a.webp", Image.Exif()
    exif[0x0112] = 6
    first = Image.new("RGB", (40, 30), "blue")
    first.paste("red", (0, 0, 20, 30))  # at the left: after the turn at the top
    path_args = {"save_all": True, "append_images": [Image.new("RGB", (40, 30))], "duration": 100}
    first.save(path, lossless=True, exif=exif.tobytes(), **path_args)
    frame = next(iter(Video(path)))
    np.testing.assert_array_equal(frame, pictures.read(path).pixels)
    assert frame.shape == (40, 30, 3) and (frame[:20] == (255, 0, 0)).all()


def test_drawn_videos_play_in_browsers(tmp_path):
    with video_writer(tmp_path / "a.webm", 25) as add:
        for shade in SHADES:
            add(np.full((41, 63, 3), shade, np.uint8))
    capture = cv2.VideoCapture(str(tmp_path / "a.webm"))
    assert int(capture.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little") in (b"VP80", b"VP90")
    assert (tmp_path / "a.webm").read_bytes()[:64].count(b"webm") == 1
    frames = list(Video(tmp_path / "a.webm"))
    assert [frame.shape for frame in frames] == [(40, 62, 3)] * 5
    np.testing.assert_allclose([frame.mean() for frame in frames], SHADES, atol=4)


def test_frames_of_another_size_and_times_that_jump(tmp_path):
    with video_writer(tmp_path / "a.webm", 10) as add:
        add(np.full((40, 60, 3), 10, np.uint8), 0.0)
        add(np.full((20, 30, 3), 210, np.uint8), 0.04)  # due at the same time as the first
        add(np.full((80, 120, 3), 110, np.uint8), None)
        add(np.full((40, 60, 3), 10, np.uint8), 0.5)
    shades = [round(frame.mean() / 10) * 10 for frame in Video(tmp_path / "a.webm")]
    assert shades == [210, 110, 110, 110, 110, 10]


def test_no_file_is_left_without_a_frame_or_after_an_error(tmp_path):
    with pytest.raises(UserError, match="no frames"), video_writer(tmp_path / "a.webm", 10):
        pass
    with pytest.raises(KeyboardInterrupt), video_writer(tmp_path / "a.webm", 10) as add:
        add(np.zeros((40, 60, 3), np.uint8))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
