"""What was saved by another release: older files give the numbers that they gave, newer ones are refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.pipelines import make_pipeline, sample
from transformers import AutoConfig, AutoModelForImageClassification

from pdiff_hf import LatentDenoiser, ParameterAutoencoder, PDiffPipeline
from pdiff_hf.hub.card import make_model_card
from pdiff_hf.hub.push import push_pipeline_to_hub
from pdiff_hf.models.saved import FORMAT_VERSION

GOLDEN = Path(__file__).parent / "golden"
# What release 0.2.0 saved: a generator with conditions of every type of field; one tuned with a map, with its base
# model; one of adapters, learned as products; one with bases of whole numbers (int8).
KINDS = ("conditional", "tuned_map", "adapters", "int8")
COMPONENTS = {"autoencoder": ParameterAutoencoder, "denoiser": LatentDenoiser}
# Other processors, and other numbers of threads, add up in another order. A sum of some hundred float32 numbers differs
# by some 1e-7 then, and 20 steps of sampling amplify that by less than 10.
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def rewrite(folder: Path, component: str, **values) -> None:
    """Changes settings in a component's config; `...` removes one."""
    path = folder / component / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


@torch.no_grad()
def test_a_generator_of_an_older_release_gives_the_numbers_that_it_gave(tmp_path):
    for component in COMPONENTS:  # it is what an older release wrote, not what this one does
        assert "format_version" not in json.loads((GOLDEN / "0.1.0" / component / "config.json").read_text())
    pipe = PDiffPipeline.from_pretrained(GOLDEN / "0.1.0")
    expected = load_file(GOLDEN / "0.1.0" / "outputs.safetensors")
    latents = pipe.autoencoder.encode(expected["snapshots"]).latents
    torch.testing.assert_close(latents, expected["latents"], **TOLERANCE)
    for steps in (1, 20):
        generated = pipe(3, steps, latents=expected["start"], output_type="pt").parameters
        torch.testing.assert_close(generated, expected[f"generated.{steps}"], **TOLERANCE)
    # the file is of numbers that differ, and that a generator with other weights does not give
    assert expected["generated.20"].std(0).min() > 0.01
    assert [t.dtype for t in pipe(1, 1, latents=expected["start"][:1]).parameters[0].values()] == [
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]

    pipe.save_pretrained(tmp_path)
    again = PDiffPipeline.from_pretrained(tmp_path)
    generated = pipe(3, 20, latents=expected["start"], output_type="pt").parameters
    assert torch.equal(again(3, 20, latents=expected["start"], output_type="pt").parameters, generated)
    for component in COMPONENTS:
        assert json.loads((tmp_path / component / "config.json").read_text())["format_version"] == FORMAT_VERSION


def golden_outputs(pipe: PDiffPipeline, folder: Path) -> dict[str, torch.Tensor]:
    """What a generator gives today for the inputs that are stored beside it."""
    inputs, encoder = load_file(folder / "outputs.safetensors"), pipe.condition_encoder
    products = pipe.autoencoder.products

    def networks(steps: int, **arguments) -> torch.Tensor:
        sampled = pipe(2, steps, output_type="pt", **arguments).parameters
        return sampled if products is None else products.expand(sampled)  # factors have signs that nothing determines

    seeded, given = torch.Generator().manual_seed(3), {}
    outputs = {"latents": pipe.autoencoder.encode(inputs["snapshots"]).latents}
    if encoder is not None:
        conditions = json.loads((folder / "conditions.json").read_text())
        given = {"condition": conditions}
        first = sorted(conditions[0])[0]
        some = [{name: value for name, value in one.items() if name != first} for one in conditions]
        outputs["embeddings"] = encoder(encoder.fields.table(conditions))
        outputs["guided"] = networks(10, latents=inputs["start"], guidance_scale=2.0, **given)
        outputs["partly_known"] = networks(10, generator=torch.Generator().manual_seed(3), condition=some)
    outputs["seeded"] = networks(10, generator=seeded, temperature=0.5, **given)
    return outputs | {f"generated.{n}": networks(n, latents=inputs["start"], **given) for n in (1, 10)}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_kind_of_generator_gives_the_numbers_that_it_gave(tmp_path, kind):
    if kind == "adapters":
        pytest.importorskip("peft")
    folder = GOLDEN / "0.2.0" / kind
    pipe = PDiffPipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path)
    stored = load_file(folder / "outputs.safetensors")
    for loaded in (pipe, PDiffPipeline.from_pretrained(tmp_path)):
        outputs = golden_outputs(loaded, folder)
        assert outputs.keys() == stored.keys() - {"snapshots", "start"}
        for name, values in outputs.items():
            torch.testing.assert_close(values, stored[name], **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
        assert outputs["generated.10"].std(0).max() > 0.01
    assert (pipe.base_model is not None) == (kind in ("tuned_map", "adapters"))


# What each report says of generated networks: mean score, and for one task that of the network chosen on validation
# and the similarity to the snapshots.
REPORTED = {"task": [19.1667, 28.0, 0.8969], "family": [12.5]}


@pytest.mark.parametrize("kind", REPORTED)
def test_a_report_of_an_older_release_is_read(tmp_path, kind):
    (tmp_path / "evaluation").mkdir()
    shutil.copyfile(GOLDEN / "0.2.0" / "reports" / f"{kind}.json", tmp_path / "evaluation" / "report.json")
    card = make_model_card(GOLDEN / "0.2.0" / "tuned_map", "alice/older", run=tmp_path)
    assert [result.metric_value for result in card.data.eval_results] == pytest.approx(REPORTED[kind], abs=1e-4)
    report = json.loads((tmp_path / "evaluation" / "report.json").read_text())
    assert report["version"] == 2 and report["verdict"] in card.text


@pytest.fixture
def saved(tmp_path) -> Path:
    config = AutoConfig.for_model("timm_wrapper", architecture="cnn3_mini", num_labels=4)
    pipe = make_pipeline(AutoModelForImageClassification.from_config(config).eval(), select="bias")
    pipe.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.mark.parametrize("component", COMPONENTS)
def test_an_unknown_format_is_refused(saved, component):
    name = COMPONENTS[component].__name__
    message = rf"{name} in '.*' cannot be used: .* and this release of pdiff_hf reads formats up to {FORMAT_VERSION}; "
    message += r"upgrade pdiff_hf \(pip install --upgrade pdiff_hf\)"
    for version in (FORMAT_VERSION + 1, 10**9, 0, -1, 1.0, "1", True, None, [1]):
        rewrite(saved, component, format_version=version, a_setting_of_that_format=3)
        with pytest.raises(ValueError, match=message) as error:
            COMPONENTS[component].from_pretrained(saved, subfolder=component)
        assert f"it was saved in format {version!r}, " in str(error.value)
    with pytest.raises(ValueError, match=message):
        PDiffPipeline.from_pretrained(saved)


def test_the_format_arrives_from_the_hub(hub, saved):
    rewrite(saved, "denoiser", format_version=FORMAT_VERSION + 1)
    push_pipeline_to_hub(saved, "alice/newer")
    with pytest.raises(ValueError, match=f"in format {FORMAT_VERSION + 1}, .* upgrade pdiff_hf"):
        PDiffPipeline.from_pretrained("alice/newer")
    for component in COMPONENTS:
        rewrite(saved, component, format_version=...)
    push_pipeline_to_hub(saved, "alice/older")
    from_hub, local = PDiffPipeline.from_pretrained("alice/older"), PDiffPipeline.from_pretrained(saved)
    assert torch.equal(sample(from_hub), sample(local))
    assert from_hub.denoiser.config.format_version == 1


@pytest.mark.parametrize("component", COMPONENTS)
def test_weights_that_are_not_those_of_the_config(saved, component):
    path = saved / component / "diffusion_pytorch_model.safetensors"
    rewrite(saved, component, kernel_size=5)
    with pytest.raises(ValueError, match=f"{COMPONENTS[component].__name__} in '.*' cannot be used: .*shape"):
        PDiffPipeline.from_pretrained(saved)
    path.unlink()
    with pytest.raises(OSError, match="no file named"):
        PDiffPipeline.from_pretrained(saved)


@pytest.mark.parametrize(
    ("component", "values"),
    [
        ("denoiser", {"latent_dim": 10**9}),
        ("denoiser", {"block_out_channels": [10**6, 10**6]}),
        ("denoiser", {"embedding_dim": 10**7}),
        ("denoiser", {"condition_dim": 10**12}),
        ("autoencoder", {"block_out_channels": [10**6, 10**6]}),
        ("autoencoder", {"layout": {"names": ["w"], "shapes": [[10**6, 10**6]], "dtypes": ["float32"]}}),
    ],
)
def test_a_network_that_does_not_fit_into_memory_is_refused_before_it_is_made(saved, component, values):
    rewrite(saved, component, **values)
    with pytest.raises(
        ValueError, match=r"describes a network of [\d,.]+ GB, and this machine has [\d,.]+ GB of free memory"
    ):
        PDiffPipeline.from_pretrained(saved)


def test_other_weights_in_the_place_of_these(saved):
    """Of the right shapes, under other names: nothing takes a random start in their place."""
    path = saved / "denoiser" / "diffusion_pytorch_model.safetensors"
    save_file({name.replace("mid_in", "mid_on"): tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=r"config and weights differ: .*'mid_in.weight'.*'mid_on.weight'"):
        PDiffPipeline.from_pretrained(saved)


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickled_weights_run_no_code(saved, tmp_path):
    expected = sample(PDiffPipeline.from_pretrained(saved))
    path = saved / "denoiser" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    torch.save(weights, path.with_suffix(".bin"))
    path.unlink()
    assert torch.equal(sample(PDiffPipeline.from_pretrained(saved)), expected)
    with pytest.raises(OSError, match="has .bin files and no safetensors files"):
        PDiffPipeline.from_pretrained(saved, use_safetensors=True)
    torch.save(weights | {"more": Code(tmp_path / "made")}, path.with_suffix(".bin"))
    with pytest.raises((OSError, ValueError)):
        PDiffPipeline.from_pretrained(saved)
    assert not (tmp_path / "made").exists()
    shutil.rmtree(saved / "denoiser")
    with pytest.raises(OSError):
        PDiffPipeline.from_pretrained(saved)
