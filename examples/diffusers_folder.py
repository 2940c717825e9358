"""A diffusers pipeline and a folder of images: which of them are behind what it makes.

    python examples/diffusers_folder.py

Writes scikit-learn's digits as PNG files, trains a small DDPM on them in about a minute, as
diffusers' training scripts do, and saves it; from there on it is what one does with a pipeline of
one's own. Needs scikit-learn and diffusers: pip install 'forebear[demo,diffusers]'
"""

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from sklearn.datasets import load_digits

import forebear as fb

COUNT, STEPS, BATCH = 500, 1200, 64


def write_photos(folder: Path) -> None:
    """Eight-pixel PNG files named by what they show."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels, labels = load_digits(return_X_y=True)
    for i in range(COUNT):
        picture = np.rint(pixels[i].reshape(8, 8) * (255 / 16)).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{labels[i]}-{i:04}.png")


def train_pipeline(photos: Path, out: Path) -> None:
    """A small U-Net, trained to tell the noise in an image."""
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    scheduler = DDPMScheduler()
    images = fb.diffusers.folder(photos, size=8, grey=True).batch(slice(None))["image"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=STEPS)
    for _ in range(STEPS):
        clean = images[torch.randint(len(images), (BATCH,))]
        noise, steps = torch.randn_like(clean), torch.randint(1000, (BATCH,))
        said = model(scheduler.add_noise(clean, noise, steps), steps).sample
        optimizer.zero_grad()
        (said - noise).square().mean().backward()
        optimizer.step()
        schedule.step()
    DDPMPipeline(unet=model, scheduler=scheduler).save_pretrained(out)


def main(root: Path) -> None:
    if not (root / "pipeline").is_dir():
        write_photos(root / "photos")
        train_pipeline(root / "photos", root / "pipeline")

    pipeline = fb.diffusers.load(root / "pipeline")
    train = fb.diffusers.images(pipeline, root / "photos")
    made = fb.diffusers.generated(pipeline, range(6))
    task = fb.diffusers.task(pipeline, levels=5)  # more levels take more memory
    fb.attribute_images(task, train, made, methods=("das", "nda"), out=root / "run")
    print(f"open {root / 'run' / 'report.html'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/diffusers-folder"))
