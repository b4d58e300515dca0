#!/usr/bin/env python
"""Time and memory of reading made-up annotations: a COCO file, also by json.loads, and a tar.

    benchmark_annotations.py [--images=62000] [--entries=10000]

The file is like Objects365 v2's: 15 boxes an image, 16 digits a number. The tar is like one of
img2dataset's: a "picture" of 30 kB, a caption and a .json an entry, of which the picture is not
read. Each way runs in a process of its own; memory is what its peak rises by.
"""

import argparse
import io
import json
import random
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

BOXES = 15  # an image; Objects365 v2 has 25.4 million for 1.74 million


def write(path: Path, images: int) -> None:
    """The made-up file."""
    generator = random.Random(0)
    entries = [
        {
            "height": 512,
            "id": number,
            "license": 5,
            "width": 769,
            "file_name": f"images/v1/patch{number % 51}/objects365_v1_{number:08d}.jpg",
            "url": "",
        }
        for number in range(images)
    ]
    annotations = [
        {
            "id": number,
            "iscrowd": 0,
            "isfake": 0,
            "area": generator.random() * 3000,
            "isreflected": 0,
            "bbox": [generator.random() * limit for limit in (700, 400, 60, 60)],
            "image_id": generator.randrange(images),
            "category_id": generator.randrange(1, 366),
        }
        for number in range(BOXES * images)
    ]
    categories = [{"id": number, "name": f"name {number}"} for number in range(1, 366)]
    document = {"images": entries, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(document))


def write_tar(path: Path, entries: int) -> None:
    """The made-up tar, all in one file as img2dataset writes 10,000."""
    picture = random.Random(0).randbytes(30_000)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(entries):
            noted = {"url": f"https://example.org/{number}.jpg", "sha256": f"{number:064x}"}
            noted |= {"status": "success", "width": 512, "height": 384, "exif": "{}" * 50}
            caption = f"a small dog, number {number}, on the grass in front of a house"
            for suffix, data in (
                ("jpg", picture),
                ("txt", caption.encode()),
                ("json", json.dumps(noted, indent=4).encode()),
            ):
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def measure_tar(path: Path) -> None:
    """Read the tar in this process and print what that took."""
    from detclipv2_jax.data.prepare.sources import img2dataset

    before, begin = _peak(), time.process_time()
    entries = sum(1 for _ in img2dataset.read(path.parent).examples)
    seconds, megabytes = time.process_time() - begin, (_peak() - before) / 1e6
    print(
        f"img2dataset.read {path.stat().st_size / 1e6:,.0f} MB of tar, {entries:,} entries: "
        f"{seconds / entries * 1e6:.0f} us of CPU an entry, {megabytes:.0f} MB of memory"
    )


def measure(way: str, path: Path) -> None:
    """Read the COCO file in this process and print what that took."""
    from detclipv2_jax.data.prepare.examples import ImageFolder
    from detclipv2_jax.data.prepare.sources import coco

    ImageFolder.find = lambda self, name: self.roots[0]  # no picture is looked for
    before, begin = _peak(), time.process_time()
    if way == "json.loads":
        kept = json.loads(path.read_bytes())
        boxes = len(kept["annotations"])
    else:
        archive = coco.read(path, ImageFolder(path.parent))
        boxes = sum(len(example.boxes) for example in archive.examples)
    seconds, megabytes = time.process_time() - begin, (_peak() - before) / 1e6
    size = path.stat().st_size / 1e6
    print(
        f"{way:<12}{size:6.0f} MB of JSON, {boxes:,} boxes: {seconds:5.1f} s of CPU, "
        f"{megabytes:6.0f} MB of memory"
    )


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Write the file, then one process for each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=62_000, help="of the COCO file")
    parser.add_argument("--entries", type=int, default=10_000, help="of the tar")
    parser.add_argument("--run", nargs=2, metavar=("WAY", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        way, path = args.run[0], Path(args.run[1])
        if way == "write":
            write(path, args.images)
            write_tar(path.with_name("00000.tar"), args.entries)
        elif way == "img2dataset.read":
            measure_tar(path.with_name("00000.tar"))
        else:
            measure(way, path)
        return
    with tempfile.TemporaryDirectory() as folder:
        # Writing in a process of its own too: a child's peak begins with its parent's.
        for way in ("write", "json.loads", "coco.read", "img2dataset.read"):
            command = [sys.executable, __file__, f"--images={args.images}"]
            command.append(f"--entries={args.entries}")
            subprocess.run([*command, "--run", way, f"{folder}/made_up.json"], check=True)


if __name__ == "__main__":
    main()
