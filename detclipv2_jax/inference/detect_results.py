"""The files that `detclip detect` writes next to the drawings, also if it is stopped.

detections.json    boxes, scores and names of all files, and the settings
coco.json          the same in COCO's format
phrases.json       with captions, in place of these
"""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from detclipv2_jax.common.atomic import write_json
from detclipv2_jax.common.interruption import Stopped, at_stop
from detclipv2_jax.common.printable import counted, printable
from detclipv2_jax.inference.input_files import Inputs

#: What the JSON file says of one image, one video or one file that failed.
Entry = dict[str, Any]


class Results:
    """What is answered so far.

    Attributes:
      images, videos: entries by the number of the file.
      failed: entries of what could not be read.
    """

    def __init__(
        self,
        path: pathlib.Path,
        about: Mapping[str, Any],
        inputs: Inputs,
        names: Sequence[str] | None = None,
    ):
        """Create results without entries; nothing is written.

        Args:
          path: of the JSON file.
          about: the model and its settings, for JSON.
          inputs: what is to be answered.
          names: what was looked for, for coco.json. None: it is not written.
        """
        self.images: dict[int, Entry] = {}
        self.videos: dict[int, Entry] = {}
        self.failed: list[Entry] = [
            {"image": path, "error": error} for path, error in inputs.failed.items()
        ]
        self._path, self._about, self._inputs, self._names = path, about, inputs, names
        self._total = len(inputs.files) + len(inputs.failed)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Write the results when the block ends; if it is stopped or fails, as not complete."""
        try:
            with at_stop(self._stopped):
                yield
        except Stopped as stopped:
            raise stopped.told(self._stopped(stopped)) from None
        except BaseException:
            self.write(is_complete=False)
            raise
        self.write(is_complete=True)

    def write(self, *, is_complete: bool) -> None:
        """Write the JSON files."""
        images = [self.images[number] for number in sorted(self.images)]
        videos = [self.videos[number] for number in sorted(self.videos)]
        counts = {"complete": is_complete, "files": self._total, "answered": self._answered()}
        kinds = {"images": images} if self._names is None else {"images": images, "videos": videos}
        content = {
            **counts,
            **self._about,
            **kinds,
            "failed": self.failed,
            "left_out": dict(self._inputs.left_out),
        }
        write_json(self._path, content)
        if self._names is not None:
            coco = to_coco(self._names, images, videos)
            write_json(self._path.with_name("coco.json"), {"info": counts, **coco})

    def summary(self) -> str:
        """Return the last lines of the command's output."""
        count = len(self.failed)
        failed = f", {count} could not be read" if count else ""
        cut = sum("error" in video for video in self.videos.values())
        failed += f", {cut} not to their end" if cut else ""
        lines = [self._inputs.left_out_line()] if self._inputs.left_out else []
        lines.append(
            f"{self._answered()} of {counted(self._total, 'file')} answered{failed}: "
            f"{printable(self._path)}"
        )
        return "\n".join(map(str, lines))

    def problems(self) -> int:
        """Return how many files could not be read, or not to their end."""
        return len(self.failed) + sum("error" in video for video in self.videos.values())

    def _answered(self) -> int:
        whole = [video for video in self.videos.values() if video.get("complete", True)]
        return len(self.images) + len(whole)

    def _stopped(self, stopped: Stopped) -> str:
        """Write what is answered as not complete; return what to print."""
        self.write(is_complete=False)
        return (
            f"{stopped}: {self._answered()} of {self._total} files are answered, and "
            f"{printable(self._path)} says that it is not complete."
        )


def to_coco(names: Sequence[str], images: Sequence[Entry], videos: Sequence[Entry]) -> Entry:
    """Return the content of detections.json in COCO's format, with a score for each box.

    Category ids count the names from 1. Each frame of a video is an image with the number of the
    frame in `frame`.
    """
    frames = [({"file_name": entry["image"]}, entry, entry["detections"]) for entry in images]
    for entry in videos:
        for frame in entry["frames"]:
            origin = {"file_name": entry["video"], "frame": frame["frame"]}
            frames.append((origin, entry, frame["detections"]))
    ids = {name: number for number, name in enumerate(names, start=1)}
    result: Entry = {
        "images": [],
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
        "annotations": [],
    }
    for number, (origin, entry, detections) in enumerate(frames, start=1):
        size = {"height": entry["height"], "width": entry["width"]}
        result["images"].append({"id": number, **origin, **size})
        for detection in detections:
            x, y, x_max, y_max = detection["box"]
            width, height = round(x_max - x, 2), round(y_max - y, 2)
            result["annotations"].append(
                {
                    "id": len(result["annotations"]) + 1,
                    "image_id": number,
                    "category_id": ids[detection["name"]],
                    "bbox": [x, y, width, height],
                    "area": round(width * height, 2),
                    "iscrowd": 0,
                    "score": detection["score"],
                }
            )
    return result
