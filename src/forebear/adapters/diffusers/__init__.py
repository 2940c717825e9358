"""Pipelines of diffusers: tasks, folders of images, and images made with known noise.

    task = fb.diffusers.task(pipeline)
    train = fb.diffusers.images(pipeline, "photos")
    queries = fb.diffusers.generated(pipeline, range(8))
    scores = fb.DAS().fit(task, train).score(queries)

Nothing here downloads anything, and the caller's pipeline is left as it was.
"""

from forebear.adapters.diffusers.folders import captions, folder
from forebear.adapters.diffusers.generating import generated
from forebear.adapters.diffusers.latents import decode, embed, latents
from forebear.adapters.diffusers.networks import attention, cross_attention, task
from forebear.adapters.diffusers.pipelines import images, load
from forebear.adapters.diffusers.schedulers import sampler_of, schedule_of

__all__ = [
    "attention",
    "captions",
    "cross_attention",
    "decode",
    "embed",
    "folder",
    "generated",
    "images",
    "latents",
    "load",
    "sampler_of",
    "schedule_of",
    "task",
]
