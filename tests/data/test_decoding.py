"""Records that contradict themselves or their index are left out of the stack."""

import numpy as np
import test_pipeline

from detclipv2_jax.data import decoding, records


def test_contradictory_records_are_left_out():
    rng = np.random.default_rng(0)
    good = records.encode(test_pipeline.record(0, "detection", rng))
    whole = records.decode(good)
    count = len(whole.concepts)
    frame = [0, 0, 0, whole.height, whole.width, 20, 20, 0]
    element = {
        "tile": np.arange(5, dtype=np.int32),
        "record": np.array([good, good, good[:40], b"", good], object),
        # The index has another number of concepts for the second, a larger picture for the last.
        "concepts": np.array([count, count - 1, count, count, count], np.int32),
        "frame": np.array([frame] * 4 + [[0, 0, 0, 400, 400, 20, 20, 0]], np.int32),
        "canvas": np.array([20, 20], np.int32),
    }
    drawn = list(decoding.decoded_steps(lambda: iter([element]), 2).as_numpy_iterator())
    assert len(whole.labels)
    assert [out["tile"].tolist() for out in drawn] == [[0]]
    assert drawn[0]["image"].shape == (1, 20, 20, 3)
    assert "does not fit" in decoding.explain(good)
    assert "not a valid record" in decoding.explain(b"\x00nonsense")
    assert "damaged" in decoding.explain(None)
