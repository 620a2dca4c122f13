"""Samples new sets of parameters of a network. Self-contained: this file is also a Hub repository's `pipeline.py`."""

import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub.errors import HTTPError
from torch import nn
from transformers import AutoConfig

from pdiff_hf.hub.push import PIPELINE_FILE, push_pipeline_to_hub
from pdiff_hf.models import LatentDenoiser, ParameterAutoencoder
from pdiff_hf.networks.adapters import ADAPTER_FOLDER, has_adapters, load_network, save_network
from pdiff_hf.networks.ensemble import EnsembleModel
from pdiff_hf.networks.replacement import Replacement
from pdiff_hf.utils.errors import first_line, limited_modules
from pdiff_hf.utils.memory import InParts

OUTPUT_TYPES = ("state_dict", "pt", "latent", "model")
# Schedulers take memory for so many steps when they are made; the longest schedules in use have 1000.
MAX_SCHEDULER_NUMBER = 1_000_000
# The last bits of a matrix product depend on its shape. So networks are computed in blocks whose sizes depend on
# nothing that a caller chooses, and the last block is filled up. On a CPU the first ones are small, which keeps one
# network cheap, and the others large, which keeps 200 within a tenth of the time that they take all at once.
CPU_BLOCKS, CPU_BLOCK = (8, 32), 40
DEVICE_BLOCK = 256
# Nor has a block more numbers than this, which bounds its memory: that of long vectors has fewer rows.
MAX_BLOCK_NUMBERS = 2**22


@dataclass
class PDiffPipelineOutput(BaseOutput):
    """
    Args:
        parameters (`list[dict[str, torch.Tensor]]`, `torch.Tensor` or `list[nn.Module]`): What `output_type` asks for:
            a state dict of the generated tensors for each network; all of them as one tensor of shape `(N, D)`, or
            their latents of shape `(N, L)`; or whole networks.
    """

    parameters: list[dict[str, torch.Tensor]] | torch.Tensor | list[nn.Module]


class PDiffPipeline(DiffusionPipeline):
    r"""
    Pipeline for generating network parameters by latent diffusion (Neural Network Diffusion, arXiv 2402.13144).

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.).

    Parameters:
        autoencoder ([`ParameterAutoencoder`]):
            Decodes latents to parameters; knows which tensors they belong to.
        denoiser ([`LatentDenoiser`]):
            Denoises latents.
        scheduler ([`SchedulerMixin`]):
            Any scheduler of diffusers.
        base_model (`PreTrainedModel` or [`ModelMixin`], *optional*):
            The network whose other tensors complete the generated ones.
    """

    model_cpu_offload_seq = "denoiser->autoencoder"
    _optional_components = ["base_model"]
    _exclude_from_cpu_offload = ["base_model"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        autoencoder: ParameterAutoencoder,
        denoiser: LatentDenoiser,
        scheduler: SchedulerMixin,
        base_model: nn.Module | None = None,
    ):
        super().__init__()
        # Components may be None while a pipeline is put together from parts.
        kinds = {"autoencoder": ParameterAutoencoder, "denoiser": LatentDenoiser, "scheduler": SchedulerMixin}
        for (name, kind), part in zip(kinds.items(), (autoencoder, denoiser, scheduler), strict=True):
            if part is not None and not isinstance(part, kind):
                raise ValueError(f"the {name} must be a {kind.__name__}, got a {type(part).__name__}")
        lengths = [part.config.latent_dim for part in (autoencoder, denoiser) if part is not None]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"the autoencoder has latents of length {lengths[0]} and the denoiser of length {lengths[1]}; they "
                "were not trained together"
            )
        if autoencoder is not None and base_model is not None:
            autoencoder.layout.check_fits(base_model.state_dict())
        self.register_modules(autoencoder=autoencoder, denoiser=denoiser, scheduler=scheduler, base_model=base_model)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "PDiffPipeline":
        """
        Like diffusers' own, but weights are read from safetensors files unless `use_safetensors=False`.

        Raises:
            OSError: if there is no such folder or repository, or a file is missing or cannot be read.
            HTTPError: of `huggingface_hub.errors`, if the connection to the Hub fails.
            ValueError: if files are damaged, do not belong together, or are of a newer format than this release reads.
        """
        folder = Path(pretrained_model_name_or_path, "base_model")
        if "base_model" not in kwargs and (folder / ADAPTER_FOLDER).is_dir():
            architecture = AutoConfig.from_pretrained(folder).architectures[0]
            kwargs["base_model"] = load_network(folder, getattr(transformers, architecture))
        try:
            with limited_modules():
                return super().from_pretrained(pretrained_model_name_or_path, **{"use_safetensors": True} | kwargs)
        except (OSError, ValueError, HTTPError):
            raise
        except Exception as error:  # what damaged files make diffusers and transformers raise has no common type
            what = f"the pipeline in '{pretrained_model_name_or_path}' cannot be used"
            raise ValueError(f"{what}: {first_line(error)}") from error

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """The index of a saved pipeline, as diffusers asks for it before it loads the components."""
        config = super().load_config(pretrained_model_name_or_path, **kwargs)
        scheduler = Path(pretrained_model_name_or_path, "scheduler", SchedulerMixin.config_name)
        if scheduler.is_file():
            try:
                settings = json.loads(scheduler.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"'{scheduler}' is not JSON: {error}") from error
            for name, value in settings.items():
                if isinstance(value, int | float) and value > MAX_SCHEDULER_NUMBER:
                    raise ValueError(f"'{scheduler}' has {name}={value}, which is above {MAX_SCHEDULER_NUMBER:,}")
        return config

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """
        Like diffusers' own, but this file goes with the components, as `pipeline.py`. With `push_to_hub=True`, `kwargs`
        are those of [`push_to_hub`], and `repo_id` is the folder's name by default.
        """
        super().save_pretrained(save_directory, safe_serialization, variant, max_shard_size)
        if has_adapters(self.base_model):  # diffusers has written its tensors under the names that they have with those
            shutil.rmtree(Path(save_directory, "base_model"))
            save_network(self.base_model, Path(save_directory, "base_model"))
        shutil.copyfile(__file__, Path(save_directory, PIPELINE_FILE))
        if push_to_hub:
            push_pipeline_to_hub(save_directory, **{"repo_id": Path(save_directory).name} | kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str = "Upload PDiffPipeline",
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        revision: str | None = None,
    ) -> str:
        """
        Like diffusers' own, but in one commit with this file, as `pipeline.py`, and with a model card that says what
        the pipeline generates. A card that the repository has already is kept. Returns the commit's address.

        Raises:
            HubError: if it cannot be pushed; nothing is published by halves, and the push can be repeated.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization, variant)
            return push_pipeline_to_hub(
                folder,
                repo_id,
                private=private,
                revision=revision,
                token=token,
                create_pr=create_pr,
                commit_message=commit_message,
            )

    def check_inputs(
        self,
        num_models: int,
        num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        batch_size: int,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        for name, value in (
            ("num_models", num_models),
            ("num_inference_steps", num_inference_steps),
            ("batch_size", batch_size),
        ):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        most = self.scheduler.config.num_train_timesteps
        if num_inference_steps > most:
            raise ValueError(f"num_inference_steps must be at most the {most} of training, got {num_inference_steps}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        if output_type == "model" and self.base_model is None:
            raise ValueError("output_type='model' needs a base model, and this pipeline has none; pass base_model=...")
        if isinstance(generator, list) and len(generator) != num_models:
            raise ValueError(
                f"a list of generators needs one for each of the {num_models} models, got {len(generator)}"
            )
        shape = (num_models, self.denoiser.config.latent_dim)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(f"callbacks can have {self._callback_tensor_inputs}, not {unknown}")

    def prepare_generators(
        self, num_models: int, generator: torch.Generator | list[torch.Generator] | None
    ) -> list[torch.Generator]:
        """
        One generator a model, all from `generator`. So the noise of a model depends on its index alone, and the first
        models of a larger sample are those of a smaller one, whatever the batch size.
        """
        if isinstance(generator, list):
            return generator
        device = generator.device if generator is not None else "cpu"
        seeds = torch.randint(2**62, (num_models,), generator=generator, device=device).tolist()
        return [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def prepare_latents(
        self, num_models: int, generators: list[torch.Generator], latents: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Starting noise of shape `(num_models, L)`, scaled as the scheduler wants it."""
        shape = (num_models, self.denoiser.config.latent_dim)
        device = self._execution_device
        if latents is None:
            latents = randn_tensor(shape, generator=generators, device=device, dtype=torch.float32)
        return latents.to(device, torch.float32) * self.scheduler.init_noise_sigma

    @torch.no_grad()
    def __call__(
        self,
        num_models: int = 1,
        num_inference_steps: int = 20,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        batch_size: int = 256,
        output_type: str = "state_dict",
        return_dict: bool = True,
        callback_on_step_end: Callable[["PDiffPipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
    ) -> PDiffPipelineOutput | tuple:
        r"""
        The call function to the pipeline for generation.

        Args:
            num_models (`int`, *optional*, defaults to 1):
                N, the number of networks to generate.
            num_inference_steps (`int`, *optional*, defaults to 20):
                The number of denoising steps.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One, or one for each network, to make generation deterministic.
            latents (`torch.Tensor`, *optional*):
                Starting noise of shape `(N, L)`, instead of noise from `generator`.
            batch_size (`int`, *optional*, defaults to 256):
                How many decoded networks at most wait on the device to be moved to the CPU (at least one block: up to
                40 networks on a CPU, 256 elsewhere). The result does not depend on it, bit for bit: networks are
                computed in blocks of fixed sizes. Only where a block does not fit into memory is it computed in parts,
                with a warning, and the last bits may then differ.
            output_type (`str`, *optional*, defaults to `"state_dict"`):
                `"state_dict"` for a list of state dicts that hold the generated tensors; `"pt"` for all parameters as a
                tensor of shape `(N, D)`; `"latent"` for their latents of shape `(N, L)`; `"model"` for a list of
                networks, which share the tensors that were not generated.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether or not to return a [`PDiffPipelineOutput`] instead of a plain tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step as `callback_on_step_end(pipe, step, timestep, callback_kwargs)`, where
                `callback_kwargs` has the tensors of `callback_on_step_end_tensor_inputs`; may return them changed.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*):
                Of `latents`, the latents of all networks, shape `(N, L)`.

        Returns:
            [`PDiffPipelineOutput`] or `tuple`:
                The generated parameters, on the CPU.

        Raises:
            ValueError: for any argument that is out of range, before anything is computed; for scheduler settings
                that cannot be used; for a result that is not finite.
        """
        self.check_inputs(
            num_models,
            num_inference_steps,
            generator,
            latents,
            batch_size,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        generators = self.prepare_generators(num_models, generator)
        latents = self.prepare_latents(num_models, generators, latents)
        self._schedule("set_timesteps", num_inference_steps, device=latents.device)
        # Schedulers of ordinary differential equations add no noise, and some of them take no generator.
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generators} if takes_generator else {}

        blocks = _blocks(num_models, latents.shape[1], latents.device)
        in_parts = InParts("networks")
        for step, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            scaled = self._schedule("scale_model_input", latents, timestep).to(self.denoiser.dtype)

            def denoise(rows: torch.Tensor, timestep=timestep) -> torch.Tensor:
                return self.denoiser(rows, timestep).sample

            prediction = torch.cat([_compute_block(denoise, scaled, block, in_parts) for block in blocks])
            # The step itself is taken for all networks at once, because schedulers keep state from step to step.
            latents = self._schedule("step", prediction.float(), timestep, latents, **extra).prev_sample
            if callback_on_step_end is not None:
                values = {"latents": latents}
                values = {name: values[name] for name in callback_on_step_end_tensor_inputs}
                latents = (callback_on_step_end(self, step, timestep, values) or {}).get("latents", latents)

        output = latents.cpu() if output_type == "latent" else self.decode_latents(latents, batch_size)
        if not output.isfinite().all():
            raise ValueError(
                "the generated numbers are not finite: do the settings of the scheduler belong to this denoiser, and "
                "is the precision high enough?"
            )
        if output_type in ("state_dict", "model"):
            output = [self.autoencoder.layout.unflatten(parameters) for parameters in output]
        if output_type == "model":
            output = [self.make_model(state_dict) for state_dict in output]
        self.maybe_free_model_hooks()
        return PDiffPipelineOutput(parameters=output) if return_dict else (output,)

    def _schedule(self, method: str, *args, **kwargs):
        """What a method of the scheduler returns. Its own errors do not say that its settings are at fault."""
        try:
            return getattr(self.scheduler, method)(*args, **kwargs)
        except Exception as error:
            name = type(self.scheduler).__name__
            raise ValueError(f"{name} cannot sample latents with the settings that it has: {error!r}") from error

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
        """Latents of shape `(N, L)` to parameters of shape `(N, D)`, on the CPU; `batch_size` as in the call."""
        device, num_parameters = self._execution_device, self.autoencoder.layout.num_parameters
        parameters = torch.empty(len(latents), num_parameters)
        latents, in_parts = latents.to(device), InParts("networks")
        waiting, first = [], 0
        # Moves from a GPU are worth putting together.
        batch_size = 1 if device.type == "cpu" else batch_size

        def decode(rows: torch.Tensor) -> torch.Tensor:
            return self.autoencoder.decode(rows).sample

        for block in _blocks(len(latents), num_parameters, device):
            waiting.append(_compute_block(decode, latents, block, in_parts))
            if block.stop - first >= batch_size or block.stop >= len(latents):
                parameters[first : block.stop] = torch.cat(waiting).cpu()
                waiting, first = [], block.stop
        return parameters

    def make_model(self, state_dict: dict[str, torch.Tensor]) -> nn.Module:
        """The base model with the tensors of `state_dict`; all others are shared with it, not copied."""
        if self.base_model is None:
            raise ValueError("this pipeline has no base model that the generated tensors could be put into")
        return Replacement(self.base_model, state_dict).network(self.base_model, state_dict)

    def ensemble(
        self,
        num_models: int = 10,
        num_inference_steps: int = 20,
        generator: torch.Generator | list[torch.Generator] | None = None,
        batch_size: int = 256,
    ) -> EnsembleModel:
        """
        New networks as one `nn.Module` that returns the mean of their probabilities, on the base model's device.
        Arguments and errors are those of the call; the networks are those that it gives for the same arguments.

        Raises:
            ValueError: if the pipeline has no base model.
        """
        if self.base_model is None:
            raise ValueError("an ensemble needs a base model, and this pipeline has none; pass base_model=...")
        parameters = self(
            num_models, num_inference_steps, generator, batch_size=batch_size, output_type="pt"
        ).parameters
        return EnsembleModel(self.base_model, self.autoencoder.layout, parameters)


def _blocks(num_models: int, length: int, device: torch.device) -> list[slice]:
    """Cuts models with vectors of so many numbers into blocks; the last one may reach beyond the last model."""
    first, later = (CPU_BLOCKS, CPU_BLOCK) if device.type == "cpu" else ((), DEVICE_BLOCK)
    most = max(1, MAX_BLOCK_NUMBERS // length)
    blocks, start = [], 0
    while start < num_models:
        size = min(most, first[len(blocks)] if len(blocks) < len(first) else later)
        blocks.append(slice(start, start + size))
        start += size
    return blocks


def _compute_block(
    function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, block: slice, in_parts: InParts
) -> torch.Tensor:
    """`function` of a block of the rows `(N, L)`, computed with as many rows as the block is long."""
    inside = rows[block]
    filled = F.pad(inside, (0, 0, 0, block.stop - block.start - len(inside)))  # (n, L) -> (size of the block, L)
    return in_parts(function, filled)[: len(inside)]
