"""Damaged and hostile pipelines; see `support/damage.py`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import load_file
from support.damage import changed, damaged, damaged_safetensors, fuzz, only
from support.pipelines import make_pipeline, sample
from support.scripts import generate
from transformers import AutoConfig, AutoModelForImageClassification

from pdiff_hf import PDiffPipeline
from pdiff_hf.hub.push import HubError, pipeline_files

JSON_FILES = [
    "model_index.json",
    "autoencoder/config.json",
    "denoiser/config.json",
    "scheduler/scheduler_config.json",
    "base_model/config.json",
]
WEIGHTS = [f"{part}/diffusion_pytorch_model.safetensors" for part in ("autoencoder", "denoiser")]
WEIGHTS.append("base_model/model.safetensors")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model("timm_wrapper", architecture="cnn3_mini", num_labels=4)
    network = AutoModelForImageClassification.from_config(config).eval()
    folder = tmp_path_factory.mktemp("pipeline")
    make_pipeline(network, select="bias").save_pretrained(folder)
    return folder


def try_pipeline(folder: Path) -> None:
    with only(OSError, ValueError):
        pipe = PDiffPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        parameters = sample(pipe, 2)
        assert parameters.isfinite().all() and parameters.shape == (2, pipe.autoencoder.layout.num_parameters)


def test_damaged_pipelines(room, full, saved, quiet):
    shutil.copytree(saved, "case")
    contents = {name: Path(saved, name).read_bytes() for name in (*JSON_FILES, *WEIGHTS)}

    @st.composite
    def cases(draw):
        name = draw(st.sampled_from([*JSON_FILES, *JSON_FILES, *WEIGHTS]))
        if name in WEIGHTS:
            return name, draw(damaged_safetensors(contents[name]))
        if draw(st.integers(0, 3)) == 0:
            return name, draw(damaged(contents[name]))
        return name, json.dumps(draw(changed(json.loads(contents[name])))).encode()

    @given(cases())
    def test(case):
        name, content = case
        Path("case", name).write_bytes(content)
        try:
            try_pipeline(Path("case"))
        finally:
            Path("case", name).write_bytes(contents[name])

    fuzz(test, 1500, full)


@pytest.mark.parametrize("name", [*JSON_FILES, *WEIGHTS])
def test_the_script_says_in_one_line_that_a_pipeline_is_damaged(room, saved, monkeypatch, name):
    shutil.copytree(saved, "case")
    Path("case", name).write_bytes(Path("case", name).read_bytes()[:-60])
    with pytest.raises(SystemExit, match="^error: ") as end:
        generate(monkeypatch, "case", "--output_dir", "networks")
    assert "case" in str(end.value) and not Path("networks").exists()


def test_names_of_tensors_are_no_paths(room, saved, monkeypatch):
    shutil.copytree(saved, "case")
    config = json.loads(Path("case/autoencoder/config.json").read_text())
    names = config["layout"]["names"]
    names[:2] = ["../../canary", str(room / "canary")]
    Path("case/autoencoder/config.json").write_text(json.dumps(config))
    shutil.rmtree("case/base_model")
    index = json.loads(Path("case/model_index.json").read_text()) | {"base_model": [None, None]}
    Path("case/model_index.json").write_text(json.dumps(index))
    generate(monkeypatch, "case", "--output_dir", "networks", "--only_generated")
    files = [f"network-0000{i}.safetensors" for i in range(3)]
    assert sorted(path.name for path in Path("networks").iterdir()) == files
    assert set(load_file(Path("networks", files[0]))) == set(names)


def test_an_index_cannot_call_what_it_names(room, saved):
    """Only libraries that diffusers knows are imported, and only what is a component is loaded."""
    Path("evil.py").write_text(f"open({str(room / 'canary')!r}, 'w')\n")
    shutil.copytree(saved, "case")
    for part in ("autoencoder", "scheduler"):
        shutil.copy("evil.py", f"case/{part}/evil.py")
    whole = json.loads(Path("case/model_index.json").read_text())
    for part in ("autoencoder", "scheduler", "base_model"):
        for wrong in (["evil", "Evil"], ["os", "system"], ["pdiff_hf", "PDiffPipeline"], ["diffusers", "UNet2DModel"]):
            Path("case/model_index.json").write_text(json.dumps(whole | {part: wrong}))
            with pytest.raises((OSError, ValueError)):
                PDiffPipeline.from_pretrained("case")


@pytest.mark.parametrize("component", ["..", "../private", "autoencoder/..", "."])
def test_an_index_cannot_publish_what_lies_elsewhere(room, saved, component):
    Path("private").mkdir()
    Path("private/key").write_text("secret")
    shutil.copytree(saved, "case")
    index = json.loads(Path("case/model_index.json").read_text()) | {component: ["diffusers", "DDIMScheduler"]}
    Path("case/model_index.json").write_text(json.dumps(index))
    with pytest.raises(HubError, match="'.*' is not a valid name of a component"):
        pipeline_files(Path("case"))
    with pytest.raises(HubError, match="'case' is not a finished pipeline"):
        Path("case/model_index.json").write_text("[")
        pipeline_files(Path("case"))
