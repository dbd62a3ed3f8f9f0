"""The smallest student that makes a video: MobileI2V's networks with one block of each kind, 9 frames of 64x64."""

from __future__ import annotations


def config():
    from edgegen.students.config import StudentConfig
    from edgegen.students.families.mobilei2v import tiny

    def spec(name, *shape):
        return {"name": name, "shape": shape}

    latent, start = (1, 16, 2, 2, 2), (1, 16, 1, 2, 2)
    data = tiny().model_dump()
    parts = data["components"]
    parts["image_encoder"] |= {"inputs": [spec("image", 1, 3, 64, 64)], "outputs": [spec("image_latent", *start)]}
    size = {"frames": 2, "height": 2, "width": 2, "blocks": ("linear", "softmax"), "rope_scale": (1.0, 1.0, 1.0)}
    parts["denoiser"]["config"] |= size
    taken = [spec("latent", *latent), spec("timestep", 1), spec("image_latent", *start), spec("flow_score", 1)]
    parts["denoiser"] |= {"inputs": taken, "outputs": [spec("prediction", *latent)]}
    parts["decoder"]["config"] |= {"crop": (64, 64), "block_out_channels": (16, 16, 16, 16)}
    parts["decoder"] |= {"inputs": [spec("latent", *latent)], "outputs": [spec("video", 1, 3, 9, 64, 64)]}
    return StudentConfig.model_validate({**data, "name": "film", "latent": {**data["latent"], "shape": latent}})


def student():
    import torch

    from edgegen.students.architectures import build_module
    from edgegen.students.student import Component, Student

    made = config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        components = {
            name: Component(name, build_module(part.architecture, dict(part.config)), part.inputs, part.outputs)
            for name, part in made.components.items()
        }
    return Student(made, components)
