"""DetCLIPv2 in PyTorch, for comparison only, as a careful PyTorch user would write it.

Hugging Face's Swin, a plain FPN, an ATSS head that runs level by level, a text tower like CLIP's
with PyTorch's own attention, and its losses (torch_losses.py). It has the arithmetic of
`detclipv2_jax.models.detclip` and `detclipv2_jax.objective`, and a test holds it to them; nothing
of the package but its configs and its constants is used here. Images are NHWC uint8, as ours.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from comparison.torch_losses import Objective, Regions, Tensors
from torch import Tensor, nn
from torch.nn import functional

from detclipv2_jax.data.batch import Batch
from detclipv2_jax.models.atss_head import HeadConfig
from detclipv2_jax.models.detclip import IMAGE_MEAN, IMAGE_STD, DetCLIPConfig
from detclipv2_jax.models.swin import SwinConfig
from detclipv2_jax.models.text import TextConfig
from detclipv2_jax.training.objective import LossConfig
from detclipv2_jax.training.optimizer import OptimizerConfig


def backbone(cfg: SwinConfig) -> nn.Module:
    """Hugging Face's Swin, with the attention that it selects."""
    return transformers.SwinBackbone(
        transformers.SwinConfig(
            embed_dim=cfg.embed_dim,
            depths=list(cfg.depths),
            num_heads=list(cfg.num_heads),
            window_size=cfg.window,
            patch_size=cfg.patch_size,
            mlp_ratio=cfg.mlp_ratio,
            qkv_bias=cfg.qkv_bias,
            drop_path_rate=cfg.drop_path,
            out_features=["stage2", "stage3", "stage4"],
        )
    )


class FPN(nn.Module):
    """FPN: three maps in, five out (NCHW)."""

    def __init__(self, widths: Sequence[int], channels: int):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in widths)
        self.output = nn.ModuleList(_conv(channels, channels) for _ in widths)
        self.extra = nn.ModuleList(_conv(channels, channels, stride=2) for _ in range(2))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return P3 to P7."""
        merged = [lateral(x) for lateral, x in zip(self.lateral, maps)]
        for level in reversed(range(len(merged) - 1)):
            size = merged[level].shape[-2:]
            above = functional.interpolate(merged[level + 1], size=size, mode="nearest")
            merged[level] = merged[level] + above
        levels = [output(x) for output, x in zip(self.output, merged)]
        for extra in self.extra:
            levels.append(extra(levels[-1]))
        return levels


def _conv(width: int, out: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(width, out, 3, stride=stride, padding=1, bias=bias)


def _branch(widths: Sequence[int], cfg: HeadConfig) -> nn.Sequential:
    return nn.Sequential(
        *(
            nn.Sequential(
                _conv(width, cfg.channels, bias=False),
                nn.GroupNorm(cfg.groups, cfg.channels),
                nn.ReLU(inplace=True),
            )
            for width in widths
        )
    )


class DeformConv(nn.Module):
    """DCNv2 (Zhu et al. 2019, eq. 1): nine bilinear samples of the map, then one product."""

    def __init__(self, width: int, cfg: HeadConfig):
        super().__init__()
        self.offset = _conv(cfg.channels, 27)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)
        self.kernel = nn.Parameter(torch.randn(3, 3, width, cfg.channels) * cfg.branch_std)
        taps = torch.tensor(list(itertools.product((-1, 0, 1), repeat=2)))  # (dy, dx), row by row
        self.register_buffer("taps", taps, persistent=False)

    def forward(self, x: Tensor, regression: Tensor) -> Tensor:
        """Sample `x` at the offsets that `regression` gives."""
        batch, width, rows, columns = x.shape
        outputs = self.offset(regression).float()
        offsets = outputs[:, :18].reshape(batch, 9, 2, rows, columns)
        weights = outputs[:, 18:].sigmoid()  # (B, 9, H, W)
        y = torch.arange(rows, device=x.device)[:, None] + self.taps[:, 0, None, None]
        z = torch.arange(columns, device=x.device) + self.taps[:, 1, None, None]
        y, z = y + offsets[:, :, 0], z + offsets[:, :, 1]
        # grid_sample counts from -1, the first pixel's left edge, to 1, the last one's right. The
        # taps are stacked vertically, so that one call samples all of them.
        grid = torch.stack([(2 * z + 1) / columns - 1, (2 * y + 1) / rows - 1], dim=-1)
        grid = grid.reshape(batch, 9 * rows, columns, 2)
        # In float32, like autocast: bfloat16 cannot represent positions between two pixels.
        samples = functional.grid_sample(x.float(), grid, padding_mode="zeros", align_corners=False)
        samples = samples.to(x.dtype).reshape(batch, width, 9, rows, columns)
        samples = samples * weights[:, None].to(samples.dtype)
        samples = samples.permute(0, 3, 4, 2, 1).reshape(batch, rows * columns, 9 * width)
        out = samples @ self.kernel.reshape(9 * width, -1).to(samples.dtype)
        return out.transpose(1, 2).reshape(batch, -1, rows, columns)


class Head(nn.Module):
    """ATSS head: two branches shared by all levels, which run one after another."""

    def __init__(self, width: int, levels: int, cfg: HeadConfig):
        super().__init__()
        first = cfg.channels if cfg.deformable else width
        self.dcn = DeformConv(width, cfg) if cfg.deformable else None
        self.cls_convs = _branch([first] + [cfg.channels] * (cfg.convs - 1), cfg)
        self.reg_convs = _branch([width] + [cfg.channels] * (cfg.convs - 1), cfg)
        self.embed = _conv(cfg.channels, cfg.embed_dim)
        self.box = _conv(cfg.channels, 4)
        self.centerness = _conv(cfg.channels, 1)
        self.scales = nn.Parameter(torch.ones(levels))

    def forward(self, levels: Sequence[Tensor]) -> Regions:
        """Return float32 outputs of all anchors, fine to coarse, each level row by row."""
        found = [[], [], []]
        for x, scale in zip(levels, self.scales):
            regression = self.reg_convs(x)
            region = x if self.dcn is None else self.dcn(x, regression)
            embedding = self.embed(self.cls_convs(region))
            outputs = (embedding, self.box(regression).float() * scale, self.centerness(regression))
            for flat, output in zip(found, outputs):
                flat.append(output.float().flatten(2).transpose(1, 2))
        embeddings, deltas, centerness = (torch.cat(flat, dim=1) for flat in found)
        return embeddings, deltas, centerness[..., 0]


class TextBlock(nn.Module):
    """Transformer block: pre-norm causal attention and MLP."""

    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.heads = cfg.heads
        self.ln_1, self.ln_2 = nn.LayerNorm(cfg.width), nn.LayerNorm(cfg.width)
        self.in_proj = nn.Linear(cfg.width, 3 * cfg.width)
        self.out_proj = nn.Linear(cfg.width, cfg.width)
        self.c_fc = nn.Linear(cfg.width, 4 * cfg.width)
        self.c_proj = nn.Linear(4 * cfg.width, cfg.width)

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the shape of the input, (M, L, C)."""
        batch, length, width = x.shape
        query, key, value = (
            part.reshape(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.in_proj(self.ln_1(x)).chunk(3, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width))
        hidden = self.c_fc(self.ln_2(x))
        return x + self.c_proj(hidden * torch.sigmoid(1.702 * hidden))


class TextTower(nn.Module):
    """CLIP's text tower on short concepts."""

    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(cfg.vocab, cfg.width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(cfg.context, cfg.width))
        self.resblocks = nn.Sequential(*(TextBlock(cfg) for _ in range(cfg.layers)))
        self.ln_final = nn.LayerNorm(cfg.width)
        self.text_projection = nn.Parameter(torch.randn(cfg.width, cfg.embed_dim) * cfg.width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return float32 features of M concepts, read at [EOS], the largest id."""
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        x = self.resblocks(x)
        end = tokens.argmax(dim=1)
        feature = self.ln_final(x[torch.arange(len(x), device=x.device), end])
        return (feature @ self.text_projection.to(feature.dtype)).float()


class DetCLIP(nn.Module):
    """The whole model."""

    def __init__(self, cfg: DetCLIPConfig):
        super().__init__()
        self.cfg = cfg
        self.backbone = backbone(cfg.swin)
        self.neck = FPN(cfg.swin.widths[1:], cfg.neck_channels)
        self.head = Head(cfg.neck_channels, len(cfg.anchors.strides), cfg.head)
        self.text = TextTower(cfg.text)
        start = cfg.initial_scale if cfg.similarity == "cosine" else 1.0
        self.logit_scale = nn.Parameter(torch.tensor(math.log(start)))
        self.logit_bias = nn.Parameter(torch.tensor(math.log(cfg.prior / (1 - cfg.prior))))
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD), persistent=False)

    def maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the backbone's maps of uint8 NHWC images."""
        x = (images.float() - self.mean) / self.std
        return self.backbone(x.permute(0, 3, 1, 2)).feature_maps

    def regions(self, levels: Sequence[Tensor]) -> Regions:
        """Return the head's outputs, with embeddings ready to compare."""
        embeddings, deltas, centerness = self.head(levels)
        return self._comparable(embeddings), deltas, centerness

    def concepts(self, tokens: Tensor) -> Tensor:
        """Return the features of the concepts, ready to compare."""
        return self._comparable(self.text(tokens))

    def _comparable(self, x: Tensor) -> Tensor:
        if self.cfg.similarity != "cosine":
            return x
        return x * x.square().sum(dim=-1, keepdim=True).clamp(min=1e-12).rsqrt()


# ---- What is timed.


class Trainer:
    """A model with its losses and its update on a device."""

    def __init__(
        self,
        cfg: DetCLIPConfig,
        loss: LossConfig,
        optimizer: OptimizerConfig,
        batch: Batch,
        *,
        device: str,
        compiled: bool,
    ):
        torch.manual_seed(0)
        self.device, self.bfloat16 = device, cfg.dtype == "bfloat16"
        self.model = DetCLIP(cfg).to(device).train()
        if device == "cuda":
            self.model.to(memory_format=torch.channels_last)
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.benchmark = True
        self.batch = Tensors(batch, device)
        self.objective = Objective(cfg, loss, batch.images.shape[1:3], device)
        self.config = optimizer
        self._compile = torch.compile if compiled else lambda function: function
        self._loss = self._compile(lambda: self.objective(self.model, self.batch))
        self._used: list[nn.Parameter] = []

    def forward_backward(self) -> None:
        """Compute loss and gradient."""
        self.model.zero_grad(set_to_none=True)
        with self._autocast():
            loss = self._loss()
        loss.backward()

    def step(self) -> None:
        """Compute loss, gradient and update, like `train_step`."""
        self.forward_backward()
        self.update()

    def update(self) -> None:
        """Clip; update by AdamW (a tenth of the rate for the text tower) and the moving average."""
        if not hasattr(self, "_adamw"):
            self._begin()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self._adamw.step()
        with torch.no_grad():
            torch._foreach_lerp_(
                self._average, list(self.model.parameters()), 1 - self.config.ema_decay
            )
        self.norm = norm

    def _begin(self) -> None:
        """Create optimizer and moving average."""
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            key = (name.startswith("text."), parameter.ndim > 1)
            groups.setdefault(key, []).append(parameter)
        rate = 1e-6  # small, because every step uses the same batch
        self._adamw = torch.optim.AdamW(
            [
                {
                    "params": parameters,
                    "lr": rate * (0.1 if text else 1.0),
                    "weight_decay": self.config.weight_decay * matrix,
                }
                for (text, matrix), parameters in groups.items()
            ],
            betas=(self.config.beta1, self.config.beta2),
            fused=True,
        )
        self._average = [p.detach().clone() for p in self.model.parameters()]

    def parts(self) -> dict[str, Callable[[], None]]:
        """Return the parts of a step by the names of ours; each runs forward and backward.

        The head is without its deformable convolution, which is timed by itself.
        """
        model, objective, batch = self.model, self.objective, self.batch
        with torch.no_grad(), self._autocast():
            maps = [m.detach() for m in model.maps(batch.images)]
            levels = [x.detach() for x in model.neck(maps)]
            regressions = [model.head.reg_convs(x) for x in levels]
            regions = [x.detach() for x in model.regions(levels)]
            concepts = model.concepts(batch.tokens).detach()
        found = {
            "backbone": self._pulled(lambda: model.maps(batch.images), model.backbone, []),
            "neck": self._pulled(lambda: model.neck(maps), model.neck, maps),
        }
        dcn, model.head.dcn = model.head.dcn, None
        plain = self._pulled(lambda: model.regions(levels), model.head, levels)

        def without_dcn() -> None:
            held, model.head.dcn = model.head.dcn, None
            plain()
            model.head.dcn = held

        model.head.dcn = dcn
        found["head"] = without_dcn
        if dcn is not None:
            found["deformable sampling"] = self._pulled(
                lambda: [dcn(x, r) for x, r in zip(levels, regressions)],
                dcn,
                [*levels, *regressions],
            )
        found["text"] = self._pulled(lambda: model.concepts(batch.tokens), model.text, [])
        scale = model.logit_scale.detach().exp()
        bias = model.logit_bias.detach().clone()
        learned = [*regions, concepts, scale, bias]
        if batch.kind == "image_text":
            choose = self._compile(lambda: objective.choose(regions, concepts, scale, bias, batch))
            chosen = objective.choose(regions, concepts, scale, bias, batch)
            loss = lambda: objective.contrast(regions[0], concepts, scale, chosen, batch)
            found["choice of regions"] = lambda: self._run(choose)
        else:
            assign = self._compile(lambda: objective.assign(batch))
            targets = objective.assign(batch)
            loss = lambda: objective.dense(regions, concepts, scale, bias, targets, batch)
            found["assignment"] = lambda: self._run(assign)
        found["losses"] = self._pulled(loss, None, learned)
        self.forward_backward()
        found["optimizer"] = self.update
        return found

    def _pulled(
        self, forward: Callable[[], Any], module: nn.Module | None, learned: Sequence[Tensor]
    ) -> Callable[[], None]:
        """Return a function that runs forward and backward under random cotangents."""
        parameters = [] if module is None else list(module.parameters())
        forward, cotangents = self._compile(forward), []

        def run() -> None:
            for x in learned:
                x.requires_grad_(True)
            with self._autocast():
                outputs = forward()
            outputs = [outputs] if torch.is_tensor(outputs) else list(outputs)
            if not cotangents:
                cotangents.extend(torch.randn_like(x) for x in outputs)
            torch.autograd.grad(
                outputs, [*parameters, *learned], grad_outputs=cotangents, allow_unused=True
            )

        return run

    def _run(self, function: Callable[[], Any]) -> None:
        with torch.no_grad(), self._autocast():
            function()

    def _autocast(self) -> contextlib.AbstractContextManager:
        if not self.bfloat16:
            return contextlib.nullcontext()
        return torch.autocast(self.device, torch.bfloat16)
