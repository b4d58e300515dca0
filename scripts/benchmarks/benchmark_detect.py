"""Time per image with 80, 1,203 and 20,000 names, compared with Grounding DINO and OWLv2.

    python scripts/benchmarks/benchmark_detect.py --output=DIR [--rounds=3] [--alone]
        [--names=80,1203,20000]

Ours is Swin-T at 800×1333. The others are Hugging Face's models in the sizes of
`grounding-dino-tiny` (800×1333) and `owlv2-base-patch16` (960×960, its own size). All weights are
random and float32; image and names are the same. The contestants take turns within one run;
`--alone` leaves the others out. The device is the one that JAX and PyTorch find.

Grounding DINO reads names together with the image, 40 at a time, because they must fit into 256
tokens: one chunk is timed and multiplied by the number of chunks. The other two encode names once
for all images: a batch of 256 names is timed, multiplied, and reported separately. Our time covers
everything from a uint8 array to boxes after suppression; theirs covers the model alone, without
scaling and post-processing.

Writes detect.json, detect.md and detect.png.
"""

import argparse
import dataclasses
import functools
import itertools
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from detclipv2_jax.common.atomic import replacing, write_json, write_text
from detclipv2_jax.inference import predictor as predictor_lib
from detclipv2_jax.inference.config import DecodeConfig
from detclipv2_jax.inference.predictor import EncodedNames, Predictor, padded_count
from detclipv2_jax.models import sizes
from detclipv2_jax.models.detclip import create
from detclipv2_jax.text.tokenizer import tokenize

CHUNK = 40  # names that Grounding DINO reads together
TEXT_BATCH = 256  # names that a text tower encodes together
HEIGHT, WIDTH = 800, 1333
OURS, DINO, OWL = "DetCLIPv2, ours", "Grounding DINO", "OWLv2"
COLORS = "red green blue white black grey brown pink yellow purple"
SORTS = "small large old new broken wooden metal plastic paper glass striped spotted wet dry round "
SORTS += "flat tall short open closed folded hanging lying standing toy painted rusty shiny dusty "
SORTS += "cheap modern antique tiny huge narrow wide curved straight empty full"
THINGS = "cat dog car bus train boat bicycle bench chair table lamp clock cup bottle plate fork "
THINGS += "knife spoon bowl apple banana orange cake pizza kite ball racket glove helmet shoe hat "
THINGS += "coat bag umbrella book phone laptop keyboard mouse oven sink towel vase pillow blanket "
THINGS += "ladder bucket hammer sofa window"


def names(count: int) -> list[str]:
    """Return the first `count` of 22,000 different names of one to three words."""
    things, sorts = THINGS.split(), ["", *SORTS.split()]
    every = itertools.product(["", *COLORS.split()], sorts, things)
    found = [" ".join(filter(None, words)) for words in itertools.islice(every, count)]
    if len(set(found)) != count:
        raise SystemExit(f"--names: {count} is too many; at most {len(set(found))} are available.")
    return found


def image() -> np.ndarray:
    """Return a smooth picture with noise."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    waves = np.stack([np.sin(x / 90), np.cos(y / 70), np.sin((x + y) / 130)], axis=-1)
    noise = np.random.default_rng(0).normal(scale=12, size=waves.shape)
    return np.clip(127 + 90 * waves + noise, 0, 255).astype(np.uint8)


class Ours:
    """Our model, used as `Detector` and `evaluate` use it."""

    def __init__(self):
        config = dataclasses.replace(sizes.SWIN_T, dtype="float32", remat="none")
        self._parts = create(config, 0)
        self._predictor = self._fresh()
        self._image = image()

    def _fresh(self) -> Predictor:
        # 300 boxes without a threshold, as for standard AP: more work than showing boxes to people.
        config = DecodeConfig(max_detections=300)
        return Predictor(*self._parts, canvas=(800, 1344), config=config, batch_size=1)

    def texts(self, count: int) -> EncodedNames:
        """Return names with random unit vectors (random weights would map all to nearly one)."""
        rows = np.zeros((padded_count(count), sizes.SWIN_T.text.embed_dim), np.float32)
        drawn = np.random.default_rng(0).normal(size=(count, rows.shape[1]))
        rows[:count] = drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)
        asked = tuple(names(count))
        return EncodedNames(asked, asked, rows, np.arange(len(rows)) < count)

    def read_names(self, asked: Sequence[str]) -> None:
        """Encode the names without a cache."""
        self._fresh().encode(asked)

    def answer(self, texts: EncodedNames) -> None:
        """Detect names in the image, from pixels to boxes."""
        ((_, found),) = self._predictor.stream([self._image], texts)
        if len(found) != 300:
            raise SystemExit(f"our model found {len(found)} boxes, expected 300.")

    def temporary_bytes(self, count: int) -> int:
        """Return the memory of the compiled program without parameters, inputs and outputs."""
        rows = padded_count(count)
        shape = jax.ShapeDtypeStruct
        program = predictor_lib._compiled_predict.lower(
            *self._parts,
            shape((1, 800, 1344, 3), np.uint8),
            shape((1, 2), np.int32),
            shape((rows, sizes.SWIN_T.text.embed_dim), np.float32),
            shape((rows,), bool),
            np.float32(0),
            config=dataclasses.replace(self._predictor.config, score_threshold=0.0),
            replicated=None,
        )
        return program.compile().memory_analysis().temp_size_in_bytes


class Torch:
    """Hugging Face's two models in their published sizes, with random weights."""

    def __init__(self):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        self._torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        self._dino = transformers.GroundingDinoForObjectDetection(
            transformers.GroundingDinoConfig()
        )
        owl = transformers.Owlv2Config(vision_config={"image_size": 960})
        self._owl = transformers.Owlv2ForObjectDetection(owl)
        for model in (self._dino, self._owl):
            model.eval().to(self.device)
        pixels = torch.from_numpy(image()).to(self.device).permute(2, 0, 1)[None] / 127.5 - 1
        self._pixels = pixels
        self._square = torch.nn.functional.interpolate(pixels, (960, 960), mode="bilinear")

    def dino_chunk(self, asked: Sequence[str]) -> Callable[[], None]:
        """Return a function that runs Grounding DINO once, with up to 40 names in its prompt."""
        torch = self._torch
        # BERT's [CLS], the names with a full stop after each, [SEP]. Each name has as many tokens
        # as with CLIP; with random weights it does not matter which.
        lengths = (tokenize(asked) > 0).sum(axis=1) - 2
        body = [token for length in lengths for token in [2003] * int(length) + [1012]]
        ids = torch.tensor([[101, *body, 102]], device=self.device)
        if ids.shape[1] > 256:
            raise SystemExit(f"{len(asked)} names are {ids.shape[1]} tokens, more than 256.")
        arguments = {
            "pixel_values": self._pixels,
            "input_ids": ids,
            "token_type_ids": torch.zeros_like(ids),
            "attention_mask": torch.ones_like(ids),
        }
        return lambda: self._run(lambda: self._dino(**arguments))

    def owl(self, count: int) -> Callable[[], None]:
        """Return a function that runs OWLv2 on the image with `count` names already encoded."""
        torch, model = self._torch, self._owl
        width = model.config.projection_dim
        queries = torch.randn(1, count, width, device=self.device)

        def answer():
            features = model.image_embedder(self._square)
            features = features if torch.is_tensor(features) else features[0]
            rows = features.flatten(1, 2)
            model.class_predictor(rows, queries)
            model.objectness_predictor(rows)
            model.box_predictor(rows, features)

        return lambda: self._run(answer)

    def owl_names(self, asked: Sequence[str]) -> Callable[[], None]:
        """Return a function that runs OWLv2's text tower on up to 256 names."""
        ids = self._torch.from_numpy(tokenize(asked).astype(np.int64)).to(self.device)
        return lambda: self._run(lambda: self._owl.owlv2.text_model(ids))

    def _run(self, function: Callable[[], Any]) -> None:
        with self._torch.inference_mode():
            function()
        if self.device == "cuda":
            self._torch.cuda.synchronize()


def seconds(function: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds of one call: wall-clock time and processor time of all cores."""
    start, cores = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - start, time.process_time() - cores


def measure(
    ours: Ours, others: Torch | None, counts: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    """Return a row per number of names: medians of the seconds per image of each contestant.

    In each round everything runs once, in turn. `others` None: only ours.
    """
    text_batch = names(TEXT_BATCH)
    work = {(OURS, n): functools.partial(ours.answer, ours.texts(n)) for n in counts}
    work[OURS, "names"] = lambda: ours.read_names(text_batch)
    if others is not None:
        work |= {(OWL, n): others.owl(n) for n in counts}
        work |= {
            "chunk": others.dino_chunk(text_batch[:CHUNK]),
            (OWL, "names"): others.owl_names(text_batch),
        }
    for function in work.values():
        function()  # compiles, or warms up
    times: dict[Any, list[tuple[float, float]]] = {key: [] for key in work}
    for _ in range(rounds):
        for key, function in work.items():
            times[key].append(seconds(function))
            print(key, *(f"{value:.2f}" for value in times[key][-1]), flush=True)
    medians = {key: np.median(values, axis=0) for key, values in times.items()}
    rows = []
    for count in counts:
        chunks, text_batches = -(-count // CHUNK), -(-count // TEXT_BATCH)
        image = {OURS: medians[OURS, count]}
        if others is not None:
            image |= {DINO: chunks * medians["chunk"], OWL: medians[OWL, count]}
        rows.append(
            {
                "names": count,
                "chunks": chunks,
                "seconds": {name: float(clock) for name, (clock, _) in image.items()},
                "core_seconds": {name: float(cores) for name, (_, cores) in image.items()},
                "names_core_seconds": {
                    name: float(text_batches * medians[name, "names"][1])
                    for name in image
                    if name != DINO
                },
                "temporary_mb": ours.temporary_bytes(count) / 1e6,
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| names | | s per image | images/s | ours is faster by | core seconds | by core seconds | "
        "names, core seconds | temporary MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for name, value in row["seconds"].items():
            label = f"{name}, {row['chunks']} chunks" if name == DINO else name
            cores = row["core_seconds"][name]
            faster = "" if name == OURS else f"{value / row['seconds'][OURS]:.1f} ×"
            by_cores = "" if name == OURS else f"{cores / row['core_seconds'][OURS]:.1f} ×"
            once = row["names_core_seconds"].get(name)
            once = "per image" if once is None else f"{once:.1f}"
            memory = f"{row['temporary_mb']:.0f}" if name == OURS else ""
            cells = [f"{row['names']:,}", label, f"{value:.2f}", f"{1 / value:.3g}", faster]
            cells += [f"{cores:.2f}", by_cores, once, memory]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw images per second over the number of names."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    counts = [row["names"] for row in rows]
    for name in rows[0]["seconds"]:
        axes.plot(counts, [1 / row["seconds"][name] for row in rows], "o-", label=name)
    axes.set(xscale="log", xlabel="names", ylabel="images/s, names already encoded")
    if len(rows[0]["seconds"]) > 1:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="directory for the results")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default: %(default)s)")
    parser.add_argument(
        "--names", default="80,1203,20000", help="numbers of names (default: %(default)s)"
    )
    parser.add_argument("--alone", action="store_true", help="measure only our model")
    args = parser.parse_args()
    ours, others = Ours(), None if args.alone else Torch()
    counts = [int(count) for count in args.names.split(",")]
    rows = measure(ours, others, counts, args.rounds)
    print(table(rows))
    devices = {"jax": jax.devices()[0].device_kind}
    versions = {"python": platform.python_version(), "jax": jax.__version__}
    if others is not None:
        import torch
        import transformers

        devices["torch"] = others.device
        versions |= {"torch": torch.__version__, "transformers": transformers.__version__}
    result = {"device": devices, "versions": versions, "rows": rows}
    output = Path(args.output)
    write_json(output / "detect.json", result)
    write_text(output / "detect.md", table(rows) + "\n")
    draw(rows, output / "detect.png")


if __name__ == "__main__":
    from detclipv2_jax.common.cli import exit_status

    raise SystemExit(exit_status(main))
