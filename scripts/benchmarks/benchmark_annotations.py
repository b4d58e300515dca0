#!/usr/bin/env python
"""Time and memory of reading generated annotations: a COCO file and a tar of img2dataset.

    benchmark_annotations.py [--images=62000] [--entries=10000]

The COCO file resembles Objects365 v2: 15 boxes per image, 16 digits per number. It is also read
with json.loads, for comparison. Each entry of the tar is an image of 30 kB, which is not
read, a caption and a .json file. Each reader runs in its own process; memory is the increase of its
peak.
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

BOXES = 15  # per image; Objects365 v2 has 25.4 million boxes in 1.74 million images


def write(path: Path, images: int) -> None:
    """Write the COCO file."""
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
    """Write the tar; img2dataset puts 10,000 entries into a file."""
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
    """Read the tar in this process; print time and memory."""
    from detclipv2_jax.data.prepare.sources import img2dataset

    before, begin = _peak(), time.process_time()
    entries = sum(1 for _ in img2dataset.read(path.parent).examples)
    seconds, megabytes = time.process_time() - begin, (_peak() - before) / 1e6
    print(
        f"img2dataset.read {path.stat().st_size / 1e6:,.0f} MB of tar, {entries:,} entries: "
        f"{seconds / entries * 1e6:.0f} us of CPU per entry, {megabytes:.0f} MB of memory"
    )


def measure(reader: str, path: Path) -> None:
    """Read the COCO file in this process; print time and memory."""
    from detclipv2_jax.common.find_file import Found, ImageFolder
    from detclipv2_jax.data.prepare.sources import coco

    ImageFolder.find = lambda self, *names: Found(self.roots[0])  # do not look for images
    before, begin = _peak(), time.process_time()
    if reader == "json.loads":
        kept = json.loads(path.read_bytes())
        boxes = len(kept["annotations"])
    else:
        archive = coco.read(path, ImageFolder(path.parent))
        boxes = sum(len(example.boxes) for example in archive.examples)
    seconds, megabytes = time.process_time() - begin, (_peak() - before) / 1e6
    size = path.stat().st_size / 1e6
    print(
        f"{reader:<12}{size:6.0f} MB of JSON, {boxes:,} boxes: {seconds:5.1f} s of CPU, "
        f"{megabytes:6.0f} MB of memory"
    )


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Write the files, then measure each reader in its own process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--images", type=int, default=62_000, help="images of the COCO file (default: %(default)s)"
    )
    parser.add_argument(
        "--entries", type=int, default=10_000, help="entries of the tar (default: %(default)s)"
    )
    parser.add_argument("--run", nargs=2, metavar=("READER", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        reader, path = args.run[0], Path(args.run[1])
        if reader == "write":
            write(path, args.images)
            write_tar(path.with_name("00000.tar"), args.entries)
        elif reader == "img2dataset.read":
            measure_tar(path.with_name("00000.tar"))
        else:
            measure(reader, path)
        return
    with tempfile.TemporaryDirectory() as folder:
        # Writing has its own process, too: a child's peak starts at its parent's.
        for reader in ("write", "json.loads", "coco.read", "img2dataset.read"):
            command = [sys.executable, __file__, f"--images={args.images}"]
            command.append(f"--entries={args.entries}")
            subprocess.run([*command, "--run", reader, f"{folder}/generated.json"], check=True)


if __name__ == "__main__":
    from detclipv2_jax.common.cli import exit_status

    raise SystemExit(exit_status(main))
