"""Time of WordNet, a dictionary of 14,000 names, a step's concepts, and phrases of captions.

    python scripts/benchmarks/benchmark_concepts.py --captions=captions_train.json

The dictionary consists of nouns of WordNet; a temporary folder holds it. Times are processor
seconds, which other jobs on the machine hardly change. Phrases are measured with the matrix product
of spaCy and that of NumPy, on one core and on all cores, in separate processes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from detclipv2_jax.data import dictionary as dictionary_lib
from detclipv2_jax.data.config import KindConfig
from detclipv2_jax.data.index import Source
from detclipv2_jax.data.plan import Plan
from detclipv2_jax.data.prepare import dictionary_writer
from detclipv2_jax.data.vocabulary import Vocabulary
from detclipv2_jax.text import phrases
from detclipv2_jax.text.tokenizer import keys, pack_tokens, tokenize, tokenizer
from detclipv2_jax.text.wordnet import WordNet, wordnet

SIZE, BATCH, CONCEPTS_PER_IMAGE, TABLE = 14_000, 128, 100, 2048
CAPTIONS = 4000  # to parse; those of the file are repeated


def seconds(run: Callable[[], object], times: int = 1) -> float:
    """Return the processor seconds of one call, the best of three rounds."""
    rounds = []
    for _ in range(3):
        started = time.process_time()
        for _ in range(times):
            run()
        rounds.append((time.process_time() - started) / times)
    return min(rounds)


def grounding(names: Sequence[str], records: int = 4096) -> Source:
    """Return a source in memory whose records have five of the names each."""
    positives = np.random.default_rng(0).integers(0, len(names), 5 * records)
    return Source(
        directory=Path("nowhere"),
        name="grounding",
        kind="grounding",
        info={"records": records, "shards": [records]},
        height=np.full(records, 600, np.uint16),
        width=np.full(records, 800, np.uint16),
        positives_offsets=np.arange(records + 1) * 5,
        positives=positives.astype(np.int32),
        tokens=pack_tokens(tokenize(names)),
        keys=keys(names),
        vocabulary=np.ones(len(names), bool),
    )


def time_dictionary(folder: Path) -> None:
    """Print the times of WordNet, making and opening a dictionary, and planning a step."""
    print(f"WordNet read{seconds(WordNet):33.2f} s")
    nouns = [lemma.replace("_", " ") for lemma in wordnet()._senses if lemma.isascii()]
    names = nouns[: 5 * SIZE : 5]
    print(f"{SIZE:,} names defined and written{_made(folder, names):15.2f} s")
    tokenizer()
    source = grounding(names)

    def opened() -> Vocabulary:
        dictionary = dictionary_lib.Dictionary.open(folder)
        return Vocabulary({"grounding": source}, dictionary, defined=["grounding"])

    print(f"read, tokens of all with definitions{seconds(opened):9.2f} s")
    vocabulary = opened()
    config = KindConfig(
        sources=("grounding",),
        batch_size=BATCH,
        shapes=((800, 1344),),
        table_size=TABLE,
        concepts_per_image=CONCEPTS_PER_IMAGE,
    )
    plan = Plan({"grounding": source}, vocabulary, {"grounding": config}, 0)
    step = plan.plan(0)
    label = f"a step of {BATCH} × {CONCEPTS_PER_IMAGE} concepts: plan"
    print(f"{label:<39}{1e3 * seconds(lambda: plan.plan(0), 30):6.1f} ms")
    tokens = seconds(lambda: vocabulary.tokens(step.concepts, "grounding"), 30)
    print(f"its table of {TABLE} rows of tokens{1e3 * tokens:15.1f} ms")


def _made(folder: Path, names: Sequence[str]) -> float:
    return seconds(lambda: dictionary_writer.build(folder, names, {}))


def time_phrases(captions: Path) -> None:
    """Print captions per second of one process and of one per core, with both matrix products."""
    cores = len(os.sched_getaffinity(0))
    for threads, what in (("", "blis, spaCy's own"), ("1", "NumPy's, one thread")):
        for processes in dict.fromkeys((1, cores)):
            rates, found = zip(*_phrases_in(processes, captions, threads))
            label = f"phrases, {what}, {processes} process{'es' * (processes > 1)}"
            print(f"{label:<48}{sum(rates):7,.0f} captions/s  (phrases {found[0]})")


def _phrases_in(processes: int, captions: Path, threads: str) -> list[tuple[float, str]]:
    environment = os.environ | {"OPENBLAS_NUM_THREADS": threads}
    command = [sys.executable, __file__, f"--captions={captions}", "--worker"]
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    return [tuple(json.loads(process.communicate()[0])) for process in started]


def parse_captions(path: Path) -> tuple[float, str]:
    """Return captions per processor second, and a checksum of the phrases."""
    rows = json.loads(path.read_text(encoding="utf-8"))["annotations"]
    captions = [row["caption"] for row in rows]
    captions = (captions * (CAPTIONS // len(captions) + 1))[:CAPTIONS]
    list(phrases.noun_phrases(captions[:200]))
    found = [phrase for row in phrases.noun_phrases(captions) for phrase in row]
    rate = CAPTIONS / seconds(lambda: list(phrases.noun_phrases(captions)))
    return rate, f"{np.bitwise_xor.reduce(keys([f'{i} {p}' for i, p in enumerate(found)])):x}"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--captions", metavar="FILE.json", type=Path, help="captions in COCO's format"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(parse_captions(args.captions)))
        return
    with tempfile.TemporaryDirectory() as folder:
        time_dictionary(Path(folder))
    if args.captions:
        time_phrases(args.captions)


if __name__ == "__main__":
    from detclipv2_jax.common.cli import exit_status

    raise SystemExit(exit_status(main))
