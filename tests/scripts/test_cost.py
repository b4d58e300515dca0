"""scripts/benchmarks/cost.py: what a recipe costs."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.training import config as config_lib
from detclipv2_jax.training import recipes
from detclipv2_jax.training.utilization import model_flops

_PATH = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks" / "cost.py"


@pytest.fixture(scope="module")
def cost():
    # Scripts with the same flags cannot be imported into one process otherwise.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ml_collections.config_flags.DEFINE_config_file", lambda *_: None)
        return _imported()


def _imported():
    spec = importlib.util.spec_from_file_location("cost", _PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_paper_recipe_has_the_paper_steps(cost):
    # Yao et al. 2023: 0.66 M and 0.77 M boxed images in batches of 128, 13 M pairs in 6144.
    config = config_lib.parse(recipes.load("pretrain").get_config("swin_t").to_dict())
    records = cost.parse_records(["detection=660000", "grounding=770000", "image_text=13000000"])
    table = cost.costs(config, records)
    assert {kind: steps for kind, (steps, _) in table.items()} == {
        "detection": 5157,
        "grounding": 6016,
        "image_text": 2116,
    }
    assert table["image_text"][1] == model_flops(config, "image_text", (320, 320))


def test_mean_over_rungs_follows_their_chances(cost):
    config = config_lib.parse(recipes.load("pretrain").get_config("nano").to_dict())
    detection = dataclasses.replace(config.data.detection, rungs=(0.5, 1.0))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, detection=detection))
    ((steps, flops),) = cost.costs(config, {"detection": 33}).values()
    # Without `rung_phases` a rung's chance is proportional to its factor: 1/3 and 2/3.
    small, large = (model_flops(config, "detection", (side, side)) for side in (64, 128))
    assert steps == 3
    assert flops == pytest.approx((small + 2 * large) / 3, rel=1e-9)


def test_hours_are_flops_over_peak_and_mfu(cost):
    rows = cost.device_table(312e12 * 3600, 0.5).splitlines()
    assert "| A100 | 312 | 2 | 0.2 |" in rows


def test_malformed_records_are_explained(cost):
    with pytest.raises(UserError, match="--records=detection: expected KIND=NUMBER"):
        cost.parse_records(["detection"])
