"""What a GPU needs of a pipeline: nothing waits in the loop, half precision, and offloading."""

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler
from support.pipelines import LATENT_DIM, make_conditional_pipeline, make_network, make_pipeline, sample

from pdiff_hf import PDiffPipeline

CONDITION = {"angle": 37.0, "kind": "plain"}


class Done(Exception):
    """Ends sampling after its last step."""


def stop_after_the_last_step(pipe, step, timestep, values):
    assert values["latents"].device.type == "meta"
    if step == 2:
        raise Done
    return {}


@pytest.mark.parametrize("guidance_scale", [None, 2.0])
@pytest.mark.parametrize(
    "scheduler_class",
    [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler],
)
def test_no_step_waits_for_the_device(scheduler_class, guidance_scale):
    """A tensor on the meta device has no values: whatever asked for one, by `.item()` or `.cpu()`, would raise."""
    conditional = guidance_scale is not None
    pipe = make_conditional_pipeline() if conditional else make_pipeline(make_network())
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)
    pipe.to("meta")
    with pytest.raises(Done):
        arguments = {"condition": torch.zeros(300, 12), "guidance_scale": guidance_scale} if conditional else {}
        sample(pipe, 300 // (1 + 299 * conditional), callback_on_step_end=stop_after_the_last_step, **arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("conditional", [False, True])
def test_half_precision(dtype, conditional, tmp_path):
    pipe = make_conditional_pipeline() if conditional else make_pipeline(make_network())
    pipe.save_pretrained(tmp_path)
    half = PDiffPipeline.from_pretrained(tmp_path, dtype=dtype)
    half.set_progress_bar_config(disable=True)
    assert {p.dtype for part in (half.denoiser, half.autoencoder.decoder) for p in part.parameters()} == {dtype}
    for name in ("parameter_mean", "parameter_std", "latent_mean", "latent_std"):
        assert torch.equal(getattr(half.autoencoder, name), getattr(pipe.autoencoder, name)), name
    condition = {"condition": CONDITION} if conditional else {}
    expected, got = sample(pipe, 20, **condition), sample(half, 20, **condition)
    assert got.dtype == torch.float32
    assert torch.equal(sample(copy.deepcopy(pipe).to(dtype), 20, **condition), got)
    spread = expected.std(0)
    assert ((got - expected).square().mean(0).sqrt() < 0.1 * spread).all()
    assert not torch.equal(got, expected)


class Arrival(ModelHook):
    """Counts how often a model would have to come to its device."""

    count = 0

    def pre_forward(self, module, *args, **kwargs):
        self.count += 1
        return args, kwargs


def test_an_offloaded_model_comes_to_its_device_before_any_of_its_methods_is_used():
    """`enable_model_cpu_offload` hooks into `forward`; a pipeline calls other methods of its models too."""
    pipe = make_conditional_pipeline()
    encoder, autoencoder = pipe.condition_encoder, pipe.autoencoder
    hooks = {name: Arrival() for name in ("condition_encoder", "denoiser", "autoencoder")}
    for name, hook in hooks.items():
        add_hook_to_module(getattr(pipe, name), hook)
    sample(pipe, 2, condition=CONDITION)
    assert {name: hook.count > 0 for name, hook in hooks.items()} == dict.fromkeys(hooks, True)
    latents, table = torch.zeros(2, LATENT_DIM), encoder.fields.table([CONDITION] * 2)
    for name, call in (
        ("autoencoder", lambda: autoencoder.decode(latents)),
        ("autoencoder", lambda: autoencoder.encode(torch.zeros(2, autoencoder.layout.num_parameters))),
        ("condition_encoder", lambda: encoder.complete(table, torch.zeros(2))),
    ):
        before = hooks[name].count
        call()
        assert hooks[name].count == before + 1
