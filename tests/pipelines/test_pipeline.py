"""PDiffPipeline: outputs, determinism, schedulers, callbacks, complete folders, and what it refuses."""

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler
from safetensors.torch import load_file, save_model
from support.pipelines import LATENT_DIM, make_network, make_pipeline, sample
from transformers import AutoConfig, AutoModelForImageClassification

from pdiff_hf import LatentDenoiser, LayoutError, PDiffPipeline


@pytest.fixture(scope="module")
def base_model():
    return make_network()


@pytest.fixture(scope="module")
def pipe(base_model):
    return make_pipeline(base_model)


def test_output_types_agree(pipe):
    layout = pipe.autoencoder.layout
    parameters, latents = sample(pipe), sample(pipe, output_type="latent")
    assert parameters.shape == (4, layout.num_parameters) and latents.shape == (4, LATENT_DIM)
    assert torch.equal(pipe.decode_latents(latents), parameters)
    state_dicts, models = sample(pipe, output_type="state_dict"), sample(pipe, output_type="model")
    for i in range(4):
        assert torch.equal(layout.flatten(state_dicts[i]), parameters[i])
        assert torch.equal(layout.flatten(models[i].state_dict()), parameters[i])
    (as_tuple,) = pipe(4, 3, torch.Generator().manual_seed(0), output_type="pt", return_dict=False)
    assert torch.equal(as_tuple, parameters)


def test_models_work_and_share_what_was_not_generated(pipe, base_model):
    before = copy.deepcopy(base_model.state_dict())
    first, second = sample(pipe, 2, output_type="model")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = torch.func.functional_call(
            base_model, sample(pipe, 2, output_type="state_dict")[0], (images,)
        ).logits
        assert torch.equal(first(images).logits, expected)
        assert not torch.equal(first(images).logits, second(images).logits)
    shared = [name for name in before if name not in pipe.autoencoder.layout.names]
    assert all(first.state_dict()[n].data_ptr() == base_model.state_dict()[n].data_ptr() for n in shared)
    assert all(torch.equal(base_model.state_dict()[name], tensor) for name, tensor in before.items())


def test_the_file_of_a_network_holds_no_other(pipe, tmp_path):
    model = sample(pipe, output_type="model")[0]
    save_model(model, str(tmp_path / "model.safetensors"))
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
    tensors = sample(pipe, output_type="state_dict")[0]
    torch.save(tensors, tmp_path / "tensors.pt")
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert (tmp_path / "tensors.pt").stat().st_size < 1.2 * size + 2**12


def test_a_list_of_generators_and_given_latents(pipe):
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    both = pipe(2, 3, generators, output_type="pt").parameters
    alone = pipe(1, 3, [torch.Generator().manual_seed(6)], output_type="pt").parameters
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-5)
    latents = torch.randn(2, LATENT_DIM)
    assert torch.equal(sample(pipe, 2, latents=latents), sample(pipe, 2, seed=9, latents=latents))


def test_callback_sees_and_changes_latents(pipe):
    seen = []

    def record(pipe, step, timestep, values):
        seen.append((step, int(timestep), tuple(values["latents"].shape)))
        return {"latents": torch.zeros_like(values["latents"])} if step == 2 else {}

    latents = sample(pipe, 2, output_type="latent", callback_on_step_end=record)
    assert [s[0] for s in seen] == [0, 1, 2] and seen[0][1] > seen[1][1] > seen[2][1]
    assert seen[0][2] == (2, LATENT_DIM)
    assert torch.equal(latents, torch.zeros(2, LATENT_DIM))


def test_a_saved_folder_is_complete(pipe, base_model, tmp_path):
    pipe.save_pretrained(tmp_path)
    expected = sample(pipe)
    loaded = PDiffPipeline.from_pretrained(tmp_path)
    assert torch.equal(sample(loaded), expected)
    assert not loaded.base_model.training
    for name, tensor in base_model.state_dict().items():
        assert torch.equal(loaded.base_model.state_dict()[name], tensor)
    assert type(loaded.scheduler) is type(pipe.scheduler)
    settings = [{k: v for k, v in p.scheduler.config.items() if not k.startswith("_")} for p in (loaded, pipe)]
    assert settings[0] == settings[1]


def test_any_type_of_whole_numbers(pipe):
    expected = sample(pipe, 2)
    for two in (np.int64(2), np.uint8(2), torch.tensor(2)):
        assert torch.equal(sample(pipe, two), expected)
        assert sample(pipe, two, num_inference_steps=two, output_type="latent").shape == (2, LATENT_DIM)


@pytest.mark.parametrize("how", ["loaded", "moved"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_have_the_precision_of_the_base_model(base_model, dtype, how, tmp_path):
    pipe = make_pipeline(copy.deepcopy(base_model))
    statistics = {name: tensor.clone() for name, tensor in pipe.autoencoder.named_buffers()}
    if how == "loaded":
        pipe.save_pretrained(tmp_path)
        pipe = PDiffPipeline.from_pretrained(tmp_path, dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
    else:
        pipe.to(dtype)
    for name, tensor in pipe.autoencoder.named_buffers():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, statistics[name]), name
    assert pipe.denoiser.dtype == pipe.autoencoder.dtype == dtype
    images = torch.randn(2, 3, 32, 32).to(dtype)
    network = sample(pipe, 1, output_type="model")[0]
    assert {parameter.dtype for parameter in network.parameters()} == {dtype}
    assert sample(pipe, 1).dtype == torch.float32
    with torch.no_grad():
        assert network(images).logits.dtype == dtype
        ensemble = pipe.ensemble(3, 2, torch.Generator().manual_seed(0))
        assert ensemble(images).logits.isfinite().all()


def test_threads_share_a_pipeline(base_model):
    """A scheduler that keeps what earlier steps gave."""
    pipe = make_pipeline(base_model)
    expected = [sample(pipe, 5, seed=seed, num_inference_steps=20) for seed in range(4)]
    with ThreadPoolExecutor(4) as threads:
        got = list(threads.map(lambda seed: sample(pipe, 5, seed=seed, num_inference_steps=20), range(4)))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


FORMATS = {
    "safetensors": {},
    "shards": {"max_shard_size": "2KB"},
    "variant": {"variant": "fp16"},
    "shards of a variant": {"variant": "fp16", "max_shard_size": "2KB"},
    ".bin": {"safe_serialization": False},
    ".bin shards": {"safe_serialization": False, "max_shard_size": "2KB"},
}


def test_every_format_is_loaded_as_it_was_saved_and_leaves_nothing_of_the_one_before(base_model, tmp_path):
    pipes = [make_pipeline(base_model, seed=seed) for seed in range(len(FORMATS))]
    (tmp_path / "notes.txt").write_text("not of a pipeline")
    order = [*FORMATS, *reversed(FORMATS), "shards", "safetensors", ".bin shards", "variant", ".bin"]  # one on another
    for i, name in enumerate(order):
        pipe, settings = pipes[i % len(pipes)], FORMATS[name]
        pipe.save_pretrained(tmp_path, **settings)
        if ".bin" in name:
            with pytest.raises(
                OSError, match="has .bin files and no safetensors files|no file named model.safetensors"
            ):
                PDiffPipeline.from_pretrained(tmp_path, use_safetensors=True)
        loading = {"variant": "fp16"} if "variant" in settings else {}
        loaded = PDiffPipeline.from_pretrained(tmp_path, **loading)
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(sample(loaded), sample(pipe)), (name, order[i - 1])
        weights = [path.name for path in (tmp_path / "autoencoder").iterdir() if path.name != "config.json"]
        assert (len(weights) > 1) == ("shards" in name)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("autoencoder", "denoiser", "scheduler", "base_model", "model_index.json", "pipeline.py", "notes.txt")
    }
    make_pipeline(base_model, base_model=None).save_pretrained(tmp_path)
    assert not (tmp_path / "base_model").exists()


def test_a_failed_save_leaves_the_pipeline_before(base_model, tmp_path, monkeypatch):
    pipe = make_pipeline(base_model)
    pipe.save_pretrained(tmp_path)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LatentDenoiser, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space"):
        make_pipeline(base_model, seed=1).save_pretrained(tmp_path)
    monkeypatch.undo()
    assert torch.equal(sample(PDiffPipeline.from_pretrained(tmp_path)), sample(pipe))
    assert not (tmp_path / ".part").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_models": 0}, "num_models must be .* got 0"),
        ({"num_models": 2.0}, "num_models must be .* got 2.0"),
        ({"num_inference_steps": 0}, "num_inference_steps must be .* got 0"),
        ({"num_inference_steps": 1001}, "at most the 1000 of training, got 1001"),
        ({"num_models": True}, "num_models must be .* got True"),
        ({"generator": 0}, r"generator must be a torch.Generator, such as .*manual_seed\(0\).*, got 0"),
        ({"generator": [0]}, r"generator must be a torch.Generator.* got \[0\]"),
        ({"output_type": "np"}, "output_type must be one of state_dict, pt, latent, model, adapter, got 'np'"),
        ({"num_models": 3, "generator": [torch.Generator()]}, "one for each of the 3 models, got 1"),
        ({"num_models": 2, "latents": torch.zeros(2, 5)}, r"shape \(2, 6\), got \(2, 5\)"),
        ({"callback_on_step_end_tensor_inputs": ["images"]}, r"not \['images'\]"),
    ],
)
def test_wrong_arguments(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_a_scheduler_that_cannot_take_so_few_steps_is_named(base_model):
    pipe = make_pipeline(base_model)
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="^PNDMScheduler cannot take 1 denoising steps"):
        pipe(1, num_inference_steps=1)


def test_parts_that_do_not_fit_together(base_model):
    with pytest.raises(ValueError, match="length 6 and the denoiser of length 5"):
        make_pipeline(base_model, denoiser=LatentDenoiser(5, block_out_channels=(4, 4), bottleneck_dim=4))
    config = AutoConfig.for_model("timm_wrapper", architecture="test_vit", num_labels=4)
    with pytest.raises(LayoutError, match="does not fit the base model"):
        make_pipeline(base_model, base_model=AutoModelForImageClassification.from_config(config))


def test_temperature_multiplies_the_starting_noise():
    pipe = make_pipeline(make_network())
    plain = sample(pipe, output_type="latent")
    assert torch.equal(sample(pipe, output_type="latent", temperature=1), plain)
    noise = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    halved = sample(pipe, output_type="latent", latents=0.5 * noise)
    assert torch.equal(sample(pipe, output_type="latent", latents=noise, temperature=0.5), halved)
    cold = sample(pipe, output_type="latent", temperature=0)
    assert torch.equal(cold, cold[:1].expand(4, -1)) and not torch.equal(plain[0], plain[1])
    for bad in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature must be finite and at least 0, got"):
            sample(pipe, temperature=bad)


def test_a_pipeline_samples_as_its_config_says_and_keeps_that(tmp_path):
    pipe = make_pipeline(make_network())
    pipe.register_to_config(num_inference_steps=3, temperature=0.5)
    pipe.save_pretrained(tmp_path)
    loaded = PDiffPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    expected = sample(pipe, num_inference_steps=3, temperature=0.5)
    assert torch.equal(sample(loaded, num_inference_steps=None), expected)
    assert not torch.equal(sample(loaded, num_inference_steps=None, temperature=1), expected)
