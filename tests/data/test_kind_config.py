"""Bad values in the data section of a config are refused by the name of their field."""

import pytest

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.config import DataConfig, KindConfig


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(shapes=()), r"shapes is \(\).*list of"),
        (dict(shapes=((0, 8),)), "shapes is"),
        (dict(batch_size=0), "batch_size is 0.*at least 1"),
        (dict(table_size=0), "table_size is 0"),
        (dict(concepts_per_image=-1), "concepts_per_image is -1"),
        (dict(max_boxes=-1), "max_boxes is -1"),
        (dict(begin=1.0), "begin is 1.0"),
        (dict(flip=1.5), "flip is 1.5"),
        (dict(scales=(0.0, 1.0)), "scales is"),
        (dict(scales=(2.0, 1.0)), "scales is"),
        (dict(scales=(-1.0, 1.0)), "scales is"),
        (dict(scales=(1.0,)), "scales is"),
        (dict(rungs=()), "rungs is"),
        (dict(rungs=(0.5, 0.8)), r"rungs is \(0.5, 0.8\).*the last of them 1"),
        (dict(rungs=(0.8, 0.5, 1.0)), "rungs is"),
        (dict(rungs=(0.0, 1.0)), "rungs is"),
        (dict(rungs=(1.0, 1.0)), "rungs is"),
        (dict(rungs=(0.5, 1.0), rung_phases=((1, (1, 1)),)), "rung_phases is.*from epoch 0"),
        (dict(rungs=(0.5, 1.0), rung_phases=((0, (1, 1)), (0, (1, 0)))), "rung_phases is"),
        (dict(rungs=(0.5, 1.0), rung_phases=((0, (1,)),)), "rung_phases is"),
        (dict(rungs=(0.5, 1.0), rung_phases=((0, (0, 0)),)), "rung_phases is"),
        (dict(rungs=(0.5, 1.0), rung_phases=((0, (-1, 2)),)), "rung_phases is"),
        (dict(mosaic=1.5), "mosaic is 1.5"),
        (dict(mosaic=-0.1), "mosaic is -0.1"),
        (dict(labels_per_box=0), "labels_per_box is 0.*at least 1"),
        (dict(federated=True), "scored_on is 'table'.*where `federated` is set"),
        (dict(rehearsal=("s",)), "rehearsal is .*without the names that are in `sources`"),
        (dict(rehearsal_share=-1.0), "rehearsal_share is -1.0.*at least 0"),
    ],
)
def test_a_bad_value_is_named_by_its_field(change, message):
    with pytest.raises(UserError, match=r"config\.data\.detection\." + message):
        DataConfig(detection=KindConfig(**(dict(sources=("s",)) | change)))
    # A kind without sources is not used, so not checked.
    unused = {field: value for field, value in change.items() if field != "rehearsal"}
    DataConfig(detection=KindConfig(**unused))


def test_captions_have_no_mosaics():
    with pytest.raises(UserError, match=r"config\.data\.image_text\.mosaic is 0\.5"):
        DataConfig(image_text=KindConfig(sources=("s",), mosaic=0.5))


@pytest.mark.parametrize(
    "kind, fields, message",
    [
        ("grounding", dict(scored_on="source"), "grounding.scored_on is 'source'"),
        ("grounding", dict(federated=True), "grounding.federated is True"),
        ("image_text", dict(scored_on="own"), "image_text.scored_on is 'own'"),
        ("image_text", dict(ignore_alike=("heads",)), "image_text.ignore_alike"),
    ],
)
def test_what_only_a_list_of_names_can_say(kind, fields, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**{kind: KindConfig(sources=("s",), **fields)})
