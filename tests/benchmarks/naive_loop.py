"""The yardstick: training steps as research scripts usually have them. Slow on purpose, and never to be tuned.

fp32; AdamW without a fused update; the EMA one tensor at a time; REPA's frozen ViT-B/14 at 224 pixels in each step;
SRA's teacher run through all its blocks; the loss read by `.item()` in every step.

Shapes: N images, C channels, H W latent height and width, T tokens.
"""

import copy
import itertools

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.backbones.sit import SiT
from harness.rng import global_state_kept, stream

ENCODER = "vit_base_patch14_dinov2"
PIXELS, ENCODER_PIXELS = 256, 224
REPA_BLOCK, SRA_BLOCK, SRA_TEACHER_BLOCK = 4, 3, 8
"""Those of SiT-B."""


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


class NaiveLoop:
    """One model whose step is vanilla's, REPA's or SRA's; heads that a step does not use stay as they are."""

    def __init__(self, model: str, size: int, batch: int, device: torch.device) -> None:
        self.device, self.batch = device, batch
        with global_state_kept():
            self.model = SiT.from_name(model, input_size=size).to(device)
            width = self.model.hidden_size
            self.encoder = timm.create_model(ENCODER, img_size=ENCODER_PIXELS, num_classes=0).to(device).eval()
            self.encoder.requires_grad_(False)
            self.repa_head = mlp(width, 2048, 2048, self.encoder.num_features).to(device)
            self.sra_head = mlp(width, 2 * width, width).to(device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        parts = nn.ModuleList([self.model, self.repa_head, self.sra_head])
        self.parameters = [p for p in parts.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.0, foreach=False, fused=False)
        self.generator = stream(0, "data")
        self.latents = torch.randn(batch, 4, size, size, generator=self.generator)
        self.images = torch.randint(256, (batch, 3, PIXELS, PIXELS), dtype=torch.uint8, generator=self.generator)
        self.labels = torch.arange(batch) % self.model.num_classes

    def sit(self) -> float:
        x0, noise, t = self.draw()
        velocity, _ = self.model(self.mix(x0, noise, t), t, self.labels.to(self.device))
        return self.update((velocity - (noise - x0)).square().mean())

    def repa(self) -> float:
        x0, noise, t = self.draw()
        velocity, hidden = self.model(self.mix(x0, noise, t), t, self.labels.to(self.device), taps=(REPA_BLOCK,))
        with torch.no_grad():
            images = self.images.to(self.device).float() / 255
            mean, std = (torch.tensor(values, device=self.device).view(3, 1, 1) for values in STATISTICS)
            images = F.interpolate((images - mean) / std, ENCODER_PIXELS, mode="bicubic")
            tokens = self.encoder.forward_features(images)[:, 1:]
        similarity = F.cosine_similarity(self.repa_head(hidden[REPA_BLOCK]), tokens, dim=-1).mean()
        return self.update((velocity - (noise - x0)).square().mean() - 0.5 * similarity)

    def sra(self) -> float:
        x0, noise, t = self.draw()
        labels = self.labels.to(self.device)
        velocity, hidden = self.model(self.mix(x0, noise, t), t, labels, taps=(SRA_BLOCK,))
        with torch.no_grad():
            earlier = (t - 0.2 * torch.rand(len(t), generator=self.generator).to(self.device)).clamp(min=0)
            mixed = self.mix(x0, noise, earlier)
            target = self.ema(mixed, earlier, labels, taps=(SRA_TEACHER_BLOCK,))[1][SRA_TEACHER_BLOCK]
        alignment = F.smooth_l1_loss(self.sra_head(hidden[SRA_BLOCK]), target, beta=0.05)
        return self.update((velocity - (noise - x0)).square().mean() + 0.2 * alignment)

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        x0 = self.latents.to(self.device)
        noise = torch.randn(x0.shape, generator=self.generator).to(self.device)
        return x0, noise, torch.rand(self.batch, generator=self.generator).to(self.device)

    @staticmethod
    def mix(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return (1 - t.view(-1, 1, 1, 1)) * x0 + t.view(-1, 1, 1, 1) * noise

    def update(self, loss: Tensor) -> float:
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            weights = dict(self.model.named_parameters())
            for name, average in self.ema.named_parameters():
                average.mul_(0.9999).add_(weights[name], alpha=1 - 0.9999)
        return loss.item()


STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation that DINOv2 expects."""
