"""What a model answers to a set of images, kept on disk in parts: a killed job goes on from there.

A part is a fixed run of images, answered by one device with one program and written at once. So
the answers depend neither on how many devices and processes share the work nor on where the job
was killed, and no image is answered twice.

    DIRECTORY/job.json          whose answers these are: checkpoint, images, names, settings
    DIRECTORY/part-00000.npz    plain arrays, nothing pickled
"""

import collections
import concurrent.futures
import hashlib
import json
import pathlib
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree
from tqdm import tqdm

from detclipv2_jax.common.atomic import replacing, write_json
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.evaluation.coco import ImageInfo
from detclipv2_jax.inference.detections import ImageDetections
from detclipv2_jax.inference.images import turned
from detclipv2_jax.inference.predictor import Predictor, Texts
from detclipv2_jax.models.parameters import parameter_paths

#: What there is to say of an image: None where there is no such file.
Answer = ImageDetections | UserError | None

_BATCHES = 16  # of a part: what a kill costs at most, on each device
_FIELDS = ("numbers", "counts", "sizes", "errors", "boxes", "scores", "labels")


class Predictions:
    """The parts in a directory; `paths` are the files of the images, None where there is none."""

    def __init__(
        self,
        directory: str | pathlib.Path,
        images: Sequence[ImageInfo],
        paths: Sequence[pathlib.Path | None],
        predictor: Predictor,
        texts: Texts,
    ):
        """`predictor`: what answers, or one like it; `texts`: what it is asked for."""
        self._directory = pathlib.Path(directory)
        self._images, self._paths, self._texts = images, paths, texts
        self._parts = split(images, predictor.canvas, predictor.batch_size)

    def __len__(self) -> int:
        """How many parts there are, answered or not."""
        return len(self._parts)

    def identity(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """All that the answers depend on: `about` the model and how it is asked, images, names."""
        images = [(i.id, i.file_name, i.coco_url, i.height, i.width) for i in self._images]
        names = [self._texts.names, self._texts.prompts]
        return {**about, "images": _digest(images), "names": _digest(names)}

    def begin(self, identity: Mapping[str, Any]) -> list[int]:
        """Notes whose answers the directory holds; the parts that are not there whole.

        One in which an image was missing or unreadable is done anew, as that may have changed.

        Raises:
          UserError: it holds another job's; names the first field that differs.
        """
        path = self._directory / "job.json"
        identity = json.loads(json.dumps(identity))
        if path.exists():
            self._check(path, identity)
        else:
            write_json(path, identity)
        return [part for part in range(len(self._parts)) if not self._is_whole(part)]

    def _check(self, path: pathlib.Path, identity: dict[str, Any]) -> None:
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = None
        if not isinstance(before, dict):
            raise UserError(f"{path}: cannot be read; delete {self._directory} to begin anew.")
        for field in [*identity, *before]:
            if before.get(field) != identity.get(field):
                was, now = _difference(before.get(field), identity.get(field))
                raise UserError(
                    f"{self._directory} holds the predictions of another job ({field}: {was} "
                    f"there, {now} now); give another --output, or delete it to begin anew."
                )

    def _is_whole(self, part: int) -> bool:
        found = self._load(part)
        here = [number for number in self._parts[part] if self._paths[number] is not None]
        return found is not None and found["numbers"].tolist() == here and not any(found["errors"])

    def complete(
        self, predictors: Sequence[Predictor], todo: Sequence[int], title: str | None
    ) -> None:
        """Answers the parts `todo`, each predictor those that it comes to, and writes them.

        `title` stands before the progress bar; None: no bar.
        """
        waiting, stop, lock = collections.deque(todo), threading.Event(), threading.Lock()
        total = sum(len(self._here(part)) for part in todo)
        bar = tqdm(total=total, desc=title, unit="image", disable=title is None, smoothing=0.05)

        def work(predictor: Predictor) -> None:
            while waiting and not stop.is_set():
                try:
                    part = waiting.popleft()
                except IndexError:  # another one was faster
                    return
                here = self._here(part)
                answers: dict[int, ImageDetections | UserError] = {}
                for index, found in predictor.stream([self._paths[n] for n in here], self._texts):
                    if stop.is_set():
                        return
                    answers[here[index]] = found
                    with lock:
                        bar.update()
                self._save(part, [(number, answers[number]) for number in here])

        with bar, concurrent.futures.ThreadPoolExecutor(len(predictors)) as pool:
            try:
                running = [pool.submit(work, one) for one in predictors[: max(1, len(todo))]]
                for done in concurrent.futures.as_completed(running):
                    done.result()
            finally:  # a signal, or an error of one: the others end with the batch they are at
                stop.set()

    def answers(self) -> Iterator[tuple[int, Answer]]:
        """(number of the image, its answer), in one and the same order.

        Raises:
          UserError: a part is not there.
        """
        for part, numbers in enumerate(self._parts):
            found = self._load(part)
            if found is None:
                raise UserError(
                    f"{self._path(part)} is gone or broken; the same command makes it anew."
                )
            answers = dict(self._unpacked(found))
            yield from ((number, answers.get(number)) for number in numbers)

    def _here(self, part: int) -> list[int]:
        return [number for number in self._parts[part] if self._paths[number] is not None]

    def _path(self, part: int) -> pathlib.Path:
        return self._directory / f"part-{part:05d}.npz"

    def _save(self, part: int, answers: Sequence[tuple[int, ImageDetections | UserError]]) -> None:
        nothing = ImageDetections(
            np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32), (), (0, 0)
        )
        found = [nothing if isinstance(answer, UserError) else answer for _, answer in answers]
        columns = {
            "numbers": np.array([number for number, _ in answers], np.int64),
            "counts": np.array([len(one) for one in found], np.int64),
            "sizes": np.array([one.size for one in found], np.int64).reshape(-1, 2),
            "errors": np.array(
                [str(a) if isinstance(a, UserError) else "" for _, a in answers], dtype=np.str_
            ),
            "boxes": np.concatenate([one.boxes for one in [nothing, *found]]),
            "scores": np.concatenate([one.scores for one in [nothing, *found]]),
            "labels": np.concatenate([one.labels for one in [nothing, *found]]).astype(np.int32),
        }
        with replacing(self._path(part)) as temporary, open(temporary, "wb") as file:
            np.savez(file, **columns)

    def _load(self, part: int) -> dict[str, np.ndarray] | None:
        """None where it is not there, or not as it was written."""
        try:
            with np.load(self._path(part), allow_pickle=False) as file:
                return {name: file[name] for name in _FIELDS}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def _unpacked(self, found: Mapping[str, np.ndarray]) -> Iterator[tuple[int, Answer]]:
        ends = np.cumsum(found["counts"])
        for row, number in enumerate(found["numbers"].tolist()):
            if found["errors"][row]:
                yield number, UserError(str(found["errors"][row]))
                continue
            rows = slice(ends[row] - found["counts"][row], ends[row])
            labels = found["labels"][rows]
            yield (
                number,
                ImageDetections(
                    boxes=found["boxes"][rows],
                    scores=found["scores"][rows],
                    labels=labels,
                    names=tuple(self._texts.names[label] for label in labels),
                    size=tuple(found["sizes"][row].tolist()),
                ),
            )


def split(images: Sequence[ImageInfo], canvas: tuple[int, int], batch_size: int) -> list[list[int]]:
    """The images' numbers in parts of full batches.

    A batch is of one canvas, so images that the annotations say to lie alike stand together.
    """
    lies = lambda n: turned(canvas, max(1, images[n].height), max(1, images[n].width)) != canvas
    order = sorted(range(len(images)), key=lies)
    size = _BATCHES * batch_size
    return [order[start : start + size] for start in range(0, len(order), size)]


def parameters_digest(params: PyTree) -> str:
    """A digest of a model's parameters: which checkpoint it is, wherever it lies."""
    digest = hashlib.sha256()
    for path, value in sorted(parameter_paths(params).items()):
        array = np.ascontiguousarray(jax.device_get(value))
        digest.update(repr((path, array.shape, array.dtype.str)).encode())
        digest.update(array.view(np.uint8).data)
    return digest.hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _difference(before: Any, now: Any) -> tuple[str, str]:
    """Both for people, of nested fields only what differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
        return tuple(
            ", ".join(f"{k} {json.dumps(side.get(k))[:60]}" for k in keys) for side in (before, now)
        )
    return tuple(json.dumps(side)[:20] for side in (before, now))
