"""Quantize a detector that finds what words name (OWL-ViT), and train its heads and adapters on a square in a picture.

    python examples/detect_shapes.py MODEL

MODEL is the folder of an OWL-ViT with its processor. Tasks without a command are trained so: by any loop of one's own.
"""

import sys

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, l1_loss
from transformers import OwlViTForObjectDetection

import quadapt

model = quadapt.prepare(
    OwlViTForObjectDetection.from_pretrained(sys.argv[1]), rounding="nearest", bits=4, rank=4, part="all"
)
print(f"{sum(p.numel() for p in model.parameters() if p.requires_grad)} numbers train")

# A white square in a black picture: which patch holds its middle, and where it lies (centre, width and height).
size = model.config.vision_config.image_size
picture = torch.zeros(1, 3, size, size)
picture[..., : size // 2, : size // 2] = 1
box, words = torch.tensor([0.25, 0.25, 0.5, 0.5]), torch.tensor([[2, 5, 1]])
inputs = {"input_ids": words, "pixel_values": picture, "attention_mask": torch.ones_like(words)}
patch = (model(**inputs).pred_boxes[0, :, :2].detach() - box[:2]).norm(dim=1).argmin()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
for step in range(20):
    found = model(**inputs)
    wanted = torch.zeros_like(found.logits)
    wanted[0, patch] = 1
    loss = binary_cross_entropy_with_logits(found.logits, wanted) + l1_loss(found.pred_boxes[0, patch], box)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step in (0, 19):
        print(f"{'before' if step == 0 else 'after'}: {loss.item():.4f}")
print(quadapt.merge(model)[1])
