"""Take a picture once that several annotation files of one source have.

Two versions of an annotation file in one folder would give two records of each picture, with
different boxes. The first file's record stays; `registry.discover` puts copies last. Two captions
of a picture are two examples, so of captioned files only equal captions repeat.
"""

import dataclasses
import functools
import hashlib
import os
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence

from detclipv2_jax.data.prepare.examples import Archive, Drops, Example, ImageFile
from detclipv2_jax.text.tokenizer import normalize

REASON = "images: the same picture came before"


class Distinct:
    """The examples of the archives of one source, without the pictures that came before.

    Attributes:
        kept, lost: for each archive, the names of the boxes that were yielded and left out.
    """

    def __init__(self, archives: Sequence[Archive]):
        """Prepare to read `archives`; nothing is read yet."""
        self._archives = archives
        self.kept: list[Counter[str]] = [Counter() for _ in archives]
        self.lost: list[Counter[str]] = [Counter() for _ in archives]
        self._pictures = [0] * len(archives)  # that were yielded

    def __iter__(self) -> Iterator[Example]:
        """Yield the examples, once; those left out are counted in the drops of their archive."""
        if len(self._archives) == 1:
            yield from self._archives[0].examples
            return
        seen = _Seen()
        for number, archive in enumerate(self._archives):
            for example in archive.examples:
                names = (box.name for box in example.boxes)
                if why := seen.before(example, number):
                    self.lost[number].update(names)
                    where = f"{archive.path}: image {example.image_id}"
                    archive.drops.drop(REASON, f"{where}: {why}")
                else:
                    self.kept[number].update(names)
                    self._pictures[number] += 1
                    yield dataclasses.replace(example, archive=number)

    def names(self) -> Iterator[str]:
        """Yield the categories of the archives, once `self` was read.

        A name whose boxes all lie on pictures that were left out is not yielded: it would be a
        negative of these pictures, although they show it.
        """
        for archive, kept, lost in zip(self._archives, self.kept, self.lost):
            yield from (name for name in archive.names if kept[name] or not lost[name])

    def note_differences(self, drops: Drops) -> None:
        """Count the names that only some of the archives have: elsewhere they are negatives."""
        used = [a for a, some in zip(self._archives, self._pictures) if some]
        sets = [dict.fromkeys(map(normalize, archive.names)) for archive in used]
        for names, archive in zip(sets, used):
            for name in names:
                if missing := [a.path for some, a in zip(sets, used) if name not in some]:
                    why = f"{archive.path} has {name!r}; {missing[0]} has not, so that there it is"
                    drops.note("names: not in every file", f"{why} a negative of every image")


class _Seen:
    """Remembers the pictures of earlier archives."""

    def __init__(self):
        self._files: dict[Hashable, tuple[int, str]] = {}
        self._sizes: dict[Hashable, list[tuple[int, str]]] = {}

    def before(self, example: Example, archive: int) -> str:
        """Return where an earlier archive has the same picture and caption, or "" and remember."""
        image = example.image
        if not isinstance(image, ImageFile) or image.size is not None:
            return ""  # img2dataset.py compares the pictures in shards
        try:
            status = os.stat(image.path)
        except OSError:
            return ""  # it is counted when it is opened
        caption = normalize(example.caption)
        place = status.st_dev, status.st_ino, caption
        owner, path = self._files.setdefault(place, (archive, str(image.path)))
        if owner != archive:
            return f"an earlier annotation file has {path} too"
        twins = self._sizes.setdefault((status.st_size, caption), [])
        for owner, path in twins:
            if owner != archive and _digest(path) == _digest(str(image.path)):
                return f"{image} has the bytes of {path}, which an earlier annotation file has"
        twins.append((archive, str(image.path)))
        return ""


@functools.lru_cache(maxsize=1 << 16)
def _digest(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").digest()[:16]
    except OSError:
        return os.urandom(16)  # like no other
