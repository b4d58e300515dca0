"""The stored answers of a model to the images of a dataset, so that a killed job can resume.

The images are split into chunks. A device answers a chunk with one compiled program and writes it
atomically. So the answers do not depend on how many devices and processes share the work, nor on
when the job was killed, and an image is answered only once.

    DIRECTORY/job.json          the job: a digest of the model, images and names, and the settings
    DIRECTORY/part-00000.npz    the answers of chunk 0: plain arrays, nothing pickled
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
from jaxtyping import Float, PyTree
from tqdm import tqdm

from detclipv2_jax.common import config_dict, pictures
from detclipv2_jax.common.atomic import replacing, write_json
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.evaluation.coco import ImageInfo
from detclipv2_jax.inference.config import DecodeConfig
from detclipv2_jax.inference.detections import ImageDetections
from detclipv2_jax.inference.images import AnnotatedImage, oriented_canvas
from detclipv2_jax.inference.predictor import EncodedNames, Predictor
from detclipv2_jax.models.parameters import parameter_paths

#: The answer to an image: detections, why the file cannot be read, or None if there is no file.
Answer = ImageDetections | UserError | None

_BATCHES_PER_CHUNK = 16  # per device, a kill loses at most this much work
_ARRAYS = ("numbers", "counts", "sizes", "errors", "boxes", "scores", "labels")


class AnswerStore:
    """A directory with the answers of one model to the images of one dataset, in chunks."""

    def __init__(
        self,
        directory: str | pathlib.Path,
        images: Sequence[ImageInfo],
        paths: Sequence[pathlib.Path | None],
        predictor: Predictor,
        names: EncodedNames,
    ):
        """Plan the chunks; read and write nothing yet.

        Args:
          directory: where the answers are stored.
          images: the images of the dataset.
          paths: the file of each image, None if it is missing.
          predictor: a predictor with the canvas and batch size of those that will answer.
          names: what they are asked for.
        """
        self._directory = pathlib.Path(directory)
        self._images, self._paths, self._names = images, paths, names
        self._chunks = split_into_chunks(images, predictor.canvas, predictor.batch_size)

    def __len__(self) -> int:
        """Return the number of chunks, answered or not."""
        return len(self._chunks)

    def identity(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """Return everything that the answers depend on.

        Args:
          about: the model and its settings, for JSON. Images and names are added.
        """
        images = [(i.id, i.file_name, i.coco_url, i.height, i.width) for i in self._images]
        names = [self._names.names, self._names.prompts]
        digests = {"images": _digest(images), "names": _digest(names)}
        return {**about, **digests, "pictures": pictures.RULES}

    def begin(self, identity: Mapping[str, Any]) -> list[int]:
        """Start or resume a job; return the chunks that are still to be answered.

        These include chunks with a missing or unreadable image, because it may be there now.

        Raises:
          UserError: the directory has the answers of another job; names the first difference.
        """
        path = self._directory / "job.json"
        wanted: dict[str, Any] = json.loads(json.dumps(identity))
        if path.exists():
            self._check_same_job(path, wanted)
        else:
            write_json(path, wanted)
        return [chunk for chunk in range(len(self._chunks)) if not self._is_complete(chunk)]

    def _check_same_job(self, path: pathlib.Path, identity: dict[str, Any]) -> None:
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            stored = None
        if not isinstance(stored, dict):
            raise UserError(f"{path}: cannot be read. Delete {self._directory} to start over.")
        if isinstance(stored.get("settings"), dict):  # an older version may have started the job
            stored["settings"] = config_dict.with_current_names(DecodeConfig, stored["settings"])
        for field in [*identity, *stored]:
            if stored.get(field) != identity.get(field):
                was, now = _difference(stored.get(field), identity.get(field))
                raise UserError(
                    f"{self._directory} has the answers of another job ({field}: stored {was}, "
                    f"now {now}). Choose another --output, or delete the directory to start over."
                )

    def _is_complete(self, chunk: int) -> bool:
        stored = self._load(chunk)
        if stored is None or any(stored["errors"]):
            return False
        return stored["numbers"].tolist() == list(self._files(chunk))

    def answer_chunks(
        self, predictors: Sequence[Predictor], chunks: Sequence[int], title: str | None
    ) -> None:
        """Answer some chunks and store them; each predictor takes the next chunk that waits.

        Args:
          predictors: one per device.
          chunks: as `begin` returned them.
          title: of the progress bar; None shows no bar.
        """
        waiting, stop, lock = collections.deque(chunks), threading.Event(), threading.Lock()
        total = sum(len(self._files(chunk)) for chunk in chunks)
        bar = tqdm(total=total, desc=title, unit="image", disable=title is None, smoothing=0.05)
        bar.set_postfix_str("programs are compiled first")

        def work(predictor: Predictor) -> None:
            while waiting and not stop.is_set():
                try:
                    chunk = waiting.popleft()
                except IndexError:  # another predictor took the last one
                    return
                files = self._files(chunk)
                numbers = list(files)
                answers: dict[int, ImageDetections | UserError] = {}
                sources = [annotated_image(self._images[n], path) for n, path in files.items()]
                for index, found in predictor.stream(sources, self._names):
                    if stop.is_set():
                        return
                    answers[numbers[index]] = found
                    with lock:
                        bar.set_postfix_str("", refresh=False)
                        bar.update()
                self._save(chunk, [(number, answers[number]) for number in numbers])

        with bar, concurrent.futures.ThreadPoolExecutor(len(predictors)) as pool:
            try:
                running = [pool.submit(work, one) for one in predictors[: max(1, len(chunks))]]
                for done in concurrent.futures.as_completed(running):
                    done.result()
            finally:  # after an error or a signal, the other threads stop at their next batch
                stop.set()

    def answers(self) -> Iterator[tuple[int, Answer]]:
        """Yield (index of the image, answer), always in the same order.

        Raises:
          UserError: a chunk is missing or damaged.
        """
        for chunk, numbers in enumerate(self._chunks):
            stored = self._load(chunk)
            if stored is None:
                raise UserError(
                    f"{self._path(chunk)}: missing or damaged. Run the same command again to "
                    "restore it."
                )
            answers = dict(self._unpack(stored))
            yield from ((number, answers.get(number)) for number in numbers)

    def _files(self, chunk: int) -> dict[int, pathlib.Path]:
        """Return index -> file of the images of a chunk, without the images that are missing."""
        files = ((number, self._paths[number]) for number in self._chunks[chunk])
        return {number: path for number, path in files if path is not None}

    def _path(self, chunk: int) -> pathlib.Path:
        # "part" is the word of older versions; the name stays so that their jobs can resume.
        return self._directory / f"part-{chunk:05d}.npz"

    def _save(self, chunk: int, answers: Sequence[tuple[int, ImageDetections | UserError]]) -> None:
        nothing = ImageDetections(
            np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32), (), (0, 0)
        )
        found = [nothing if isinstance(answer, UserError) else answer for _, answer in answers]
        arrays = {
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
        with replacing(self._path(chunk)) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)

    def _load(self, chunk: int) -> dict[str, np.ndarray] | None:
        """Return the arrays of a chunk, None if its file is missing or damaged."""
        try:
            with np.load(self._path(chunk), allow_pickle=False) as file:
                return {name: file[name] for name in _ARRAYS}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def _unpack(self, stored: Mapping[str, np.ndarray]) -> Iterator[tuple[int, Answer]]:
        ends = np.cumsum(stored["counts"])
        for row, number in enumerate(stored["numbers"].tolist()):
            if stored["errors"][row]:
                yield number, UserError(str(stored["errors"][row]))
                continue
            rows = slice(ends[row] - stored["counts"][row], ends[row])
            labels = stored["labels"][rows]
            yield (
                number,
                ImageDetections(
                    boxes=stored["boxes"][rows],
                    scores=stored["scores"][rows],
                    labels=labels,
                    names=tuple(self._names.names[label] for label in labels),
                    size=tuple(stored["sizes"][row].tolist()),
                ),
            )


def annotated_image(image: ImageInfo, path: pathlib.Path) -> AnnotatedImage:
    """Return the file of an image with its annotated size, which tells how boxes refer to it."""
    size = (image.height, image.width)
    return AnnotatedImage(path, size if min(size) > 0 else None)


def annotated_scale(image: ImageInfo, size: tuple[int, int]) -> Float[np.ndarray, "4"]:
    """Return the factors from boxes in pixels of a file of `size` to those of its annotations.

    They are 1 if the annotations have no size.
    """
    if not image.height:
        return np.ones(4)
    return np.tile([image.width / size[1], image.height / size[0]], 2)


def split_into_chunks(
    images: Sequence[ImageInfo], canvas: tuple[int, int], batch_size: int
) -> list[list[int]]:
    """Return the indices of the images in chunks of full batches.

    A batch has one canvas, so images of the same orientation (as annotated) stand together.
    """

    def is_turned(number: int) -> bool:
        height, width = max(1, images[number].height), max(1, images[number].width)
        return oriented_canvas(canvas, height, width) != canvas

    order = sorted(range(len(images)), key=is_turned)
    size = _BATCHES_PER_CHUNK * batch_size
    return [order[start : start + size] for start in range(0, len(order), size)]


def parameters_digest(params: PyTree) -> str:
    """Return a digest of a model's parameters, which identifies a checkpoint wherever it is."""
    digest = hashlib.sha256()
    for path, value in sorted(parameter_paths(params).items()):
        array = np.ascontiguousarray(jax.device_get(value))
        digest.update(repr((path, array.shape, array.dtype.str)).encode())
        digest.update(array.view(np.uint8).data)
    return digest.hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _difference(stored: Any, now: Any) -> tuple[str, str]:
    """Return both values as short texts; of nested fields only those that differ."""
    if isinstance(stored, dict) and isinstance(now, dict):
        keys = sorted(k for k in stored.keys() | now.keys() if stored.get(k) != now.get(k))
        text = lambda side: ", ".join(f"{k} {json.dumps(side.get(k))[:60]}" for k in keys)
    else:
        text = lambda side: json.dumps(side)[:20]
    return text(stored), text(now)
