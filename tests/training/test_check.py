"""Configs that cannot work are refused with the field's name, and every shipped config passes."""

import functools

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.index import KINDS
from detclipv2_jax.models import detclip
from detclipv2_jax.training import (
    check,
    config,
    objective,
    optimizer,
    programs,
    recipes,
    sharding,
    state,
)
from detclipv2_jax.training.inputs import abstract_batch
from detclipv2_jax.training.recipes import SCRATCH

# (recipe, argument): device counts that its batches must be divisible by: the paper's, where it
# has one, and 8.
SHIPPED = {
    ("pretrain", "nano"): (1, 2, 4, 8),
    ("pretrain", "swin_t"): (8, 32),
    ("pretrain", "swin_l"): (8, 64),
    ("pretrain", "swin_t,scratch"): (8, 32),
    ("pretrain", "swin_l,scratch"): (8, 64),
    ("coco_format", "nano"): (1, 2, 4),
    ("coco_format", "swin_t"): (1, 8),
    ("coco_format", "swin_t,scratch"): (1, 8),
    ("finetune_lvis", "nano"): (1, 2),
    ("finetune_lvis", "swin_t"): (8, 16),
    ("finetune_lvis", "swin_l"): (8, 16, 64),
    ("supervised", "nano"): (1, 2, 4),
    ("supervised", "coco_swin_t"): (1, 8, 16),
    ("supervised", "coco_swin_l"): (1, 8, 16),
    ("supervised", "lvis_swin_t"): (8, 16, 64),
    ("supervised", "lvis_swin_l"): (8, 16, 64),
    ("finetune_odinw", "nano"): (1, 2),
    ("finetune_odinw", "swin_t"): (8, 32),
    ("finetune_odinw", "swin_l"): (8, 32),
    ("finetune_coco_format", "nano"): (1, 2),
    ("finetune_coco_format", "swin_t"): (8, 32),
    ("finetune_coco_format", "swin_l"): (8, 32),
}


@functools.cache
def values(recipe="pretrain", argument="swin_t"):
    return recipes.load(recipe).get_config(argument).to_dict()


def changed(tree, path, value):
    """Return nested dicts with one value replaced."""
    first, _, rest = path.partition(".")
    return tree | {first: changed(tree[first], rest, value) if rest else value}


def parse(changes=(), recipe="pretrain", argument="swin_t"):
    tree = values(recipe, argument)
    for path, value in dict(changes).items():
        assert value is not None
        tree = changed(tree, path, value)
    return config.parse(tree)


def test_every_shipped_recipe_and_size_is_listed():
    for path in recipes.directory().glob("*.py"):
        sizes = {size for recipe, size in SHIPPED if recipe == path.stem}
        assert sizes, path
        for size in ("nano", "swin_t", "swin_l", f"swin_t,{SCRATCH}", f"swin_l,{SCRATCH}"):
            if size not in sizes:
                with pytest.raises(ValueError, match=f"{path.name}:{size}: unknown size"):
                    recipes.load(path.stem).get_config(size)


@pytest.mark.parametrize(("recipe", "argument"), SHIPPED)
def test_shipped_configs_pass(recipe, argument):
    parsed = parse(recipe=recipe, argument=argument)
    for devices in SHIPPED[recipe, argument]:
        check.check_devices(parsed, devices)
    if "image_text" not in parsed.data.kinds():
        return
    data = parsed.data.kinds()["image_text"]
    for shape in data.shapes:
        batch = abstract_batch("image_text", shape, data)
        pools = jax.eval_shape(lambda b: objective.concept_pools(b, parsed.loss), batch)
        assert pools.shape == (
            data.batch_size // parsed.loss.proposals.group,
            parsed.loss.proposals.group * data.texts_per_image,
        )


def test_a_fine_tuning_step_of_captions_is_traced():
    """The whole step at full size, by shapes alone; the other recipes differ in numbers."""
    parsed = parse(recipe="finetune_lvis")
    graphdef, params = detclip.abstract(parsed.model)
    rule = optimizer.create(parsed.optimizer, params, 1000)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    step = programs.step_function(parsed, graphdef, rule, mesh)
    before = jax.eval_shape(lambda params: state.create(params, rule), params)
    data = parsed.data.image_text
    with jax.set_mesh(mesh):
        after, log = jax.eval_shape(step, before, abstract_batch("image_text", (320, 320), data))
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert shapes(after) == shapes(before) and log["contrastive"].shape == ()


@pytest.mark.parametrize(("recipe", "argument"), SHIPPED)
def test_shipped_configs_measure_all_anchors_and_score_no_name_of_another_source(recipe, argument):
    parsed = parse(recipe=recipe, argument=argument)
    limits = parsed.eval.pre_nms_top_k, parsed.eval.max_detections
    if argument == "nano" and recipe != "coco_format":
        assert limits == (20, 20 * 236)  # nothing is cut after suppression: symbols has 236 names
    else:
        assert limits == (0, 10_000)
    for kind, data in parsed.data.kinds().items():
        assert data.scored_on == ("source" if kind == "detection" else "table")


def test_proposal_groups_are_the_papers():
    for recipe in ("pretrain", "finetune_lvis", "finetune_coco_format"):
        assert parse(recipe=recipe).loss.proposals.group == 192
        assert parse(recipe=recipe, argument="swin_l").loss.proposals.group == 96


PAIRS, DETECTION = "data.image_text", "data.detection"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"loss.proposals.group": 100},
            r"^config.loss.proposals.group is 100, which.*\b4,",
        ),
        ({"loss.proposals.k": 3000}, r"^config.loss.proposals.k is 3000, but the canvas 320×320"),
        ({"loss.proposals.nms_iou": 0.0}, r"^config.loss.proposals.nms_iou is 0.0. It must be > 0"),
        ({"loss.word_region.temperature": 0.0}, r"^config.loss.word_region.temperature is 0.0"),
        ({"loss.word_region.label_smoothing": 1.0}, "^config.loss.word_region.label_smoothing is"),
        ({"loss.candidates": 0}, "^config.loss.candidates is 0. It must be >= 1"),
        ({"loss.proposals.score": "iou"}, "^config.loss.proposals.score is 'iou', but .*'iou'"),
        ({f"{PAIRS}.micro_batches": 5}, f"^config.{PAIRS}.micro_batches is 5, .*batch_size 6144"),
        ({f"{PAIRS}.micro_batches": 0}, f"^config.{PAIRS}.micro_batches is 0"),
        ({f"{PAIRS}.texts_per_image": 0}, f"^config.{PAIRS}.texts_per_image is 0"),
        ({f"{PAIRS}.table_size": 6143}, f"^config.{PAIRS}.table_size is 6143.*6144 captions"),
        ({f"{DETECTION}.table_size": 149}, f"^config.{DETECTION}.table_size is 149.*150 concepts"),
        ({f"{DETECTION}.max_boxes": 0}, f"^config.{DETECTION}.max_boxes is 0"),
        ({"data.dictionary": ""}, f"^config.{DETECTION}.definitions is True, but config.data.dict"),
        (
            {"data.grounding.sources": ("objects365",)},
            "^config.data.grounding: source 'obj",
        ),
        ({"mesh.data": 0}, "^config.mesh.data is 0"),
        ({"mesh.fsdp": 0}, "^config.mesh.fsdp is 0"),
        ({"mesh.data": 48}, f"^config.{DETECTION}.batch_size is 128, .*48 device.*such as 144"),
        ({"model.text.context": 8}, "^config.model.text.context is 8, but a concept has 16 tokens"),
        ({"model.text.vocab": 49152}, "^config.model.text.vocab is 49152"),
        ({"model.text.activation": "relu"}, "^config.model.text.activation .*'relu'"),
        ({"optimizer.lr_rules": (("text/(", 0.1),)}, r"^config.optimizer.lr_rules: 'text/\('"),
        ({"optimizer.decay_rules": ((".*", -1.0),)}, r"^config.optimizer.decay_rules: .* -1.0"),
        ({"optimizer.ema_decay": 1.0}, "^config.optimizer.ema_decay is 1.0. It must be >= 0, < 1"),
        ({"optimizer.learning_rate": float("nan")}, "^config.optimizer.learning_rate is nan"),
        ({"train.epochs": 0.0}, "^config.train.epochs is 0.0"),
        ({"train.keep_checkpoints": 0}, "^config.train.keep_checkpoints is 0"),
        ({"seed": -1}, "^config.seed is -1"),
        ({"eval.canvas": (0, 1344)}, r"^config.eval.canvas is \(0, 1344\)"),
        ({"eval.batch_size": 0}, "^config.eval.batch_size is 0"),
        ({"eval.prompts": ("a photo",)}, r"^config.eval.prompts is .*must contain \{\} exactly"),
        (
            {"eval.prompts": ("a {}",), "eval.definitions": "on"},
            "^config.eval.prompts is .*config.eval.definitions",
        ),
        (
            {"eval.definitions": "on", f"{DETECTION}.definitions": False},
            "^config.eval.definitions is 'on', but .*bare names",
        ),
    ],
)
def test_a_config_that_cannot_work_is_refused(changes, message):
    with pytest.raises(UserError, match=message) as error:
        parse(changes)
    assert "\n" not in str(error.value)


def test_a_config_without_data_is_refused():
    none = {f"data.{kind}.sources": () for kind in ("detection", "grounding", "image_text")}
    with pytest.raises(UserError, match="^config.data: no kind of data has sources"):
        parse(none)


def test_groups_matter_only_where_the_score_has_them():
    for score in ("sample", "centerness", "step"):
        parse({"loss.proposals.group": 100, "loss.proposals.score": score})
    with pytest.raises(UserError, match="loss.proposals.group"):
        parse({"loss.proposals.group": 100, "loss.proposals.score": "batch_centerness"})


@pytest.mark.parametrize(
    ("devices", "changes", "fits"),
    [
        (32, {}, True),
        (24, {}, False),
        (64, {f"{DETECTION}.micro_batches": 4}, False),
        (64, {f"{DETECTION}.micro_batches": 2}, True),
    ],
)
def test_batches_fit_the_devices(devices, changes, fits):
    if fits:
        check.check_devices(parse(changes), devices)
        return
    with pytest.raises(UserError, match=f"^config.{DETECTION}.batch_size is 128, .*{devices} dev"):
        check.check_devices(parse(changes), devices)


# ---- Where a run starts from


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A working directory with (empty) files under the names that the recipes name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    for name in ("swin_tiny_patch4_window7_224.pth", "ViT-B-32.pt"):
        (tmp_path / "weights" / name).touch()
    return tmp_path / "weights"


def test_the_papers_recipe_needs_the_files_of_its_towers(weights):
    check.check_start(parse(), weights / "run")
    (weights / "swin_tiny_patch4_window7_224.pth").unlink()
    with pytest.raises(UserError, match="^config.init.backbone: the file weights/swin_tiny") as e:
        check.check_start(parse(), weights / "run")
    for part in ("https://github.com/SwinTransformer/", "docs/weights.md", "swin_t,scratch"):
        assert part in str(e.value)
    with pytest.raises(UserError, match="^config.init.backbone: the file weights/swin_large_.*384"):
        check.check_start(parse(argument="swin_l"), weights / "run")
    with pytest.raises(UserError, match="^config.init.text: the file other.pt .*Check the path"):
        check.check_start(parse({"init.backbone": SCRATCH, "init.text": "other.pt"}), weights)


@pytest.mark.parametrize("part", ["backbone", "text"])
def test_random_towers_are_a_decision(weights, part):
    with pytest.raises(UserError, match=f"^config.init.{part} is empty.*swin_t,scratch"):
        check.check_start(parse({f"init.{part}": ""}), weights / "run")


def test_a_random_tower_has_the_whole_learning_rate(weights):
    with pytest.raises(UserError, match=r"^config.optimizer.lr_rules: text/.* 0.1 times"):
        check.check_start(parse({"init.text": SCRATCH}), weights / "run")
    check.check_start(parse({"init.backbone": SCRATCH}), weights / "run")
    rules = ((r"backbone/layers/0/.*", 0.5), (".*", 1.0))
    with pytest.raises(UserError, match="lr_rules: backbone/layers/0/.* 0.5 times.*init.backbone"):
        check.check_start(
            parse({"init.backbone": SCRATCH, "optimizer.lr_rules": rules}), weights / "run"
        )


@pytest.mark.parametrize(
    ("recipe", "argument"), [s for s in SHIPPED if s[0] in ("pretrain", "coco_format")]
)
def test_variants_without_pretrained_towers_start(recipe, argument, tmp_path):
    parsed = parse(recipe=recipe, argument=argument)
    scratch = SCRATCH in argument or argument == "nano"
    assert (parsed.init.backbone == parsed.init.text == SCRATCH) == scratch
    # Captions: at once with pretrained towers (paper), late without.
    assert parsed.data.image_text.begin == (0.5 if scratch else 0.0)
    assert parsed.model.similarity == ("dot" if scratch else "cosine")
    if scratch:
        check.check_start(parsed, tmp_path)


def test_fine_tuning_starts_from_a_model(tmp_path, weights):
    parsed = parse(recipe="finetune_lvis")
    with pytest.raises(UserError, match="^config.init.model is 'runs/swin_t', which is neither"):
        check.check_start(parsed, tmp_path / "run")
    (tmp_path / "runs/swin_t/checkpoints/12").mkdir(parents=True)
    check.check_start(parsed, tmp_path / "run")
    for path in weights.iterdir():  # they are not read then
        path.unlink()
    check.check_start(parse({"init.model": "runs/swin_t"}), tmp_path / "run")


def test_a_run_that_resumes_needs_no_files(tmp_path):
    (tmp_path / "checkpoints/4/meta").mkdir(parents=True)
    check.check_start(parse(), tmp_path)
    check.check_start(parse({"init.text": "", "init.backbone": ""}), tmp_path)


def test_the_activation_of_the_text_tower_is_the_files(weights):
    (weights / "open_clip_config.json").write_text('{"model_cfg": {"text_cfg": {"width": 512}}}')
    save_file({"x": np.zeros(1)}, weights / "clip.safetensors")
    of_open_clip = {"init.text": "weights/clip.safetensors"}
    with pytest.raises(UserError, match="^config.model.text.activation is .*open_clip_config"):
        check.check_start(parse(of_open_clip), weights / "run")
    check.check_start(parse(of_open_clip | {"model.text.activation": "gelu"}), weights / "run")


def test_a_closed_set_needs_no_text_and_takes_only_boxes(tmp_path, weights):
    parsed = parse(recipe="supervised", argument="lvis_swin_t")
    assert not parsed.init.text
    check.check_start(parsed, tmp_path / "run")
    for changes, message in (
        ({"data.grounding.sources": ("goldg",)}, "closed_set is True, but config.data.grounding"),
        ({"model.similarity": "cosine"}, "closed_set is True, but config.model.similarity is 'cos"),
    ):
        with pytest.raises(UserError, match=message):
            parse(changes, "supervised", "lvis_swin_t")


@pytest.mark.parametrize("size", ["swin_t", "swin_l"])
def test_imagenet_is_a_fourth_kind_once_it_has_a_source(size):
    recipe = recipes.load("pretrain").get_config(size)
    assert set(config.parse(recipe.to_dict()).data.kinds()) == {*KINDS} - {"classification"}
    recipe.data.classification.sources = ("imagenet",)
    parsed = config.parse(recipe.to_dict())
    data = parsed.data.kinds()["classification"]
    assert (data.batch_size, data.repeat, data.texts_per_image) == (6144, 3, 1)
    assert data.shapes == ((320, 320),) and parsed.loss.classification_k == 1
    batch = abstract_batch("classification", (320, 320), data)
    assert batch.texts.shape == (6144, 1) and batch.boxes.shape[1] == batch.scored.shape[1] == 0
    recipe.data.classification.texts_per_image = 2
    with pytest.raises(UserError, match="data.classification.texts_per_image is 2. It must be 1"):
        config.parse(recipe.to_dict())
