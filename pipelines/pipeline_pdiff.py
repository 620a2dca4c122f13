"""Samples new sets of parameters of a network. This file is also a Hub repository's `pipeline.py`."""

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional, SupportsIndex, Union

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

from pdiff_hf.hub.pipeline import SavedPipeline
from pdiff_hf.models import ConditionEncoder, LatentDenoiser, ParameterAutoencoder
from pdiff_hf.models.condition import Condition
from pdiff_hf.models.scheduler import check_scheduler
from pdiff_hf.networks.adapters import has_adapters, with_adapters
from pdiff_hf.networks.posterior import LossFunction
from pdiff_hf.pipelines.conditions import embed_conditions, prepare_conditions
from pdiff_hf.pipelines.guidance import check_losses, guided_latents
from pdiff_hf.pipelines.latents import LatentMixin
from pdiff_hf.pipelines.networks import finite_number, require, whole_number
from pdiff_hf.utils.memory import InParts, in_blocks

if TYPE_CHECKING:
    from typing_extensions import Self

OUTPUT_TYPES = ("state_dict", "pt", "latent", "model", "adapter")


@dataclass
class PDiffPipelineOutput(BaseOutput):
    """
    Args:
        parameters (`list[dict[str, torch.Tensor]]`, `torch.Tensor` or `list[nn.Module]`): What `output_type` asks for:
            a state dict of the generated tensors for each network; all of them as one tensor of shape `(N, D)`, or
            their latents of shape `(N, L)`; whole networks; or adapters, each with `save_pretrained`.
    """

    parameters: list[dict[str, torch.Tensor]] | torch.Tensor | list[nn.Module]


class PDiffPipeline(SavedPipeline, LatentMixin, DiffusionPipeline):
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
            A scheduler of diffusers for the process that the denoiser was trained with, such as [`DDPMScheduler`],
            [`DDIMScheduler`] or [`DPMSolverMultistepScheduler`]; see [`check_scheduler`].
        base_model (`nn.Module`, *optional*):
            The network whose other tensors complete the generated ones. One of transformers or diffusers is saved with
            the pipeline; any other is passed again to `from_pretrained`.
        condition_encoder ([`ConditionEncoder`], *optional*):
            Of a generator for a family of tasks: turns what is known of a task into what the denoiser takes.
        processor (`BaseImageProcessor` or `PreTrainedTokenizerBase`, *optional*):
            What prepares images or texts for the base model; networks of timm say it in their configuration.
        recomputed_statistics (`bool`, *optional*, defaults to `False`):
            Whether its networks were evaluated with statistics of batch norm that were recomputed for each.
        num_inference_steps (`int`, *optional*, defaults to 10), guidance_scale (`float`, *optional*, defaults to 1),
        temperature (`float`, *optional*, defaults to 1):
            What a call takes where it is not told otherwise. A run saves those that its report was made with.
        base_model_reference (`dict`, *optional*):
            Of a generator of adapters: where on the Hub its base model is, in place of `base_model`. It is loaded when
            a network is asked for; see [`load_base_model`].
    """

    model_cpu_offload_seq = "condition_encoder->denoiser->autoencoder"
    _optional_components = ["base_model", "condition_encoder", "processor"]
    _exclude_from_cpu_offload = ["base_model"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        autoencoder: ParameterAutoencoder,
        denoiser: LatentDenoiser,
        scheduler: SchedulerMixin,
        # Releases of diffusers before 0.37 do not read `nn.Module | None`.
        base_model: Optional[nn.Module] = None,  # noqa: UP045
        condition_encoder: Optional[ConditionEncoder] = None,  # noqa: UP045
        processor: Optional[Union[BaseImageProcessor, PreTrainedTokenizerBase]] = None,  # noqa: UP007, UP045
        recomputed_statistics: bool = False,
        num_inference_steps: int = 10,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        base_model_reference: Optional[dict] = None,  # noqa: UP045
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
        if denoiser is not None:
            taken = denoiser.config.condition_dim
            given = None if condition_encoder is None else condition_encoder.config.embedding_dim
            if taken != given:
                raise ValueError(
                    f"the denoiser takes embeddings of length {taken} and the condition_encoder gives {given} (None: "
                    "no conditions); they were not trained together"
                )
        if autoencoder is not None and base_model is not None:
            base_model = with_adapters(base_model, autoencoder.layout)
            autoencoder.layout.check_fits(base_model.state_dict())
        self.register_modules(
            autoencoder=autoencoder,
            denoiser=denoiser,
            scheduler=scheduler,
            condition_encoder=condition_encoder,
            processor=processor,
        )
        if isinstance(base_model, PreTrainedModel | ModelMixin | None):
            self.register_modules(base_model=base_model)
        else:
            self.base_model = base_model
        self.register_to_config(
            recomputed_statistics=recomputed_statistics,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            temperature=temperature,
            base_model_reference=base_model_reference,
        )

    @classmethod
    def _get_signature_keys(cls, obj: Any) -> tuple[list[str], list[str]]:
        """A base model of no library is no component: diffusers could not save it, nor find its device and type."""
        modules, optional = super()._get_signature_keys(obj)
        if isinstance(obj, cls) and "base_model" not in obj.config:
            modules.remove("base_model")
        return modules, optional

    def to(self, *args: Any, **kwargs: Any) -> "Self":
        """Like diffusers' own. A base model of no library is moved too, but keeps its types."""
        super().to(*args, **kwargs)
        if "base_model" not in self.config and self.base_model is not None:
            self.base_model.to(self.device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        num_models: SupportsIndex = 1,
        num_inference_steps: SupportsIndex | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        condition: Condition | Sequence[Condition] | torch.Tensor | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        loss_fn: LossFunction | None = None,
        loss_guidance_scale: float = 1.0,
        output_type: str = "state_dict",
        return_dict: bool = True,
        callback_on_step_end: Callable[["PDiffPipeline", int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        batch_norm_data: Iterable[Mapping[str, Any]] | None = None,
    ) -> PDiffPipelineOutput | tuple:
        r"""
        Generates networks. They are computed in blocks of fixed sizes, in bounded memory; where a block does not fit,
        it is computed in parts, with a warning, and the last bits may then differ. Several threads may call one
        pipeline at the same time: each call steps with a copy of the scheduler.

        Args:
            num_models (`int`, *optional*, defaults to 1):
                How many networks to generate, N; of a list of conditions, for each.
            num_inference_steps (`int`, *optional*):
                The number of denoising steps; by default that of the pipeline's config, as for the next two.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One, or one for each network, to make generation deterministic.
            latents (`torch.Tensor`, *optional*):
                Starting noise of shape `(N, L)`, instead of noise from `generator`.
            condition (`Mapping`, `list` of them or `torch.Tensor`, *optional*):
                What is known of the task, such as `{"angle": 37.0, "blur": 0.4}`; `pipe.condition_encoder.fields` says
                what there is. Fields that are left out or None are drawn from the conditions seen in training. For a
                list, `num_models` networks for the first condition come first, and so on. A tensor has embeddings of
                the condition encoder, shape `(M, E)`.
            guidance_scale (`float`, *optional*):
                Scale of classifier-free guidance: above 1, away from what the denoiser predicts without a condition,
                which takes twice the time. It needs a denoiser that was trained with `condition_dropout`.
            temperature (`float`, *optional*):
                Spread of the starting noise, which it multiplies: below 1 networks are more alike, and often better.
                With `loss_fn`, 1.
            loss_fn (`Callable`, *optional*):
                What the networks should be good at: takes parameters of shape `(n, D)` and returns one loss for each
                network, shape `(n,)`, with gradients; [`example_loss`] makes one of labelled examples. The networks of
                a condition are then a sample of p(z) exp(-loss_guidance_scale · loss), where p is what ancestral
                sampling at the timesteps of the scheduler gives without it, by sequential Monte Carlo: gradients steer
                each step, and networks are weighted and resampled, so that some come several times. It is exact in the
                limit of many networks; one alone is steered without a correction. It takes some three times as long,
                and the scheduler's own steps are not used.
            loss_guidance_scale (`float`, *optional*, defaults to 1):
                Factor of the loss. With a negative log-likelihood of examples, 1 samples the posterior.
            output_type (`str`, *optional*, defaults to `"state_dict"`):
                `"state_dict"` for a list of state dicts that hold the generated tensors; `"pt"` for all parameters as a
                tensor of shape `(N, D)`; `"latent"` for their latents of shape `(N, L)`; `"model"` for a list of
                networks, which share the tensors that were not generated, in the base model's types; `"adapter"` for a
                list of [`~pdiff_hf.networks.adapters.AdapterWeights`], for which no base model is loaded.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether or not to return a [`PDiffPipelineOutput`] instead of a plain tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step as `callback_on_step_end(pipe, step, timestep, callback_kwargs)`, where
                `callback_kwargs` has the tensors of `callback_on_step_end_tensor_inputs`; may return them changed.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*):
                Of `latents`, the latents of all networks, shape `(N, L)`.
            batch_norm_data (`Iterable[Mapping]`, *optional*):
                For `output_type="model"`: batches of training data, such as a list of `{"pixel_values": ...}`, from
                which each network gets running statistics of batch norm of its own, in place of the base model's.

        Returns:
            [`PDiffPipelineOutput`] or `tuple`:
                The generated parameters, on the CPU.

        Raises:
            ValueError: for any argument that is out of range, and a scheduler that cannot sample latents or would give
                them another spread, before anything is computed; for a result that is not finite.
        """
        if guidance_scale is None:
            guidance_scale = self.config.guidance_scale
        if temperature is None:
            temperature = self.config.temperature if loss_fn is None else 1.0
        if num_inference_steps is None:
            num_inference_steps = self.config.num_inference_steps
        num_inference_steps = whole_number("num_inference_steps", num_inference_steps)
        guidance_scale = finite_number("guidance_scale", guidance_scale)
        temperature = finite_number("temperature", temperature)
        loss_guidance_scale = finite_number("loss_guidance_scale", loss_guidance_scale, positive=True)
        group_size = num_models = whole_number("num_models", num_models)
        known = prepare_conditions(self.condition_encoder, condition, num_models)
        num_models = num_models if known is None else len(known)
        check_scheduler(self.scheduler)
        most, shape = self.scheduler.config.num_train_timesteps, (num_models, self.denoiser.config.latent_dim)
        generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        require(
            num_inference_steps <= most,
            f"num_inference_steps must be at most the {most} of training, got {num_inference_steps}",
        )
        is_guided = guidance_scale != 1
        is_right = known is not None or not is_guided
        require(is_right, "guidance_scale needs a generator with conditions, and this one was trained without")
        require(
            not is_guided or self.denoiser.knows_no_condition,
            f"guidance_scale must be 1, got {guidance_scale}: the denoiser was trained with condition_dropout=0, and "
            "has not learned what guidance moves away from; train it with condition_dropout=0.1",
        )
        require(loss_fn is None or temperature == 1, f"loss_fn steers samples at temperature 1; got {temperature}")
        require(loss_fn is not None or loss_guidance_scale == 1, "loss_guidance_scale needs a loss_fn")
        is_known = output_type in OUTPUT_TYPES
        require(is_known, f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        require(
            output_type != "adapter" or bool(self.autoencoder.layout.adapters) or has_adapters(self.base_model),
            "output_type='adapter' is for a generator of adapters of PEFT, and this one has none",
        )
        require(
            batch_norm_data is None or output_type == "model",
            f"batch_norm_data is for output_type='model' and needs a base model, got {output_type!r}",
        )
        require(
            all(isinstance(one, torch.Generator) for one in generators),
            "generator must be a torch.Generator, such as torch.Generator().manual_seed(0), or a list with one for "
            f"each model, got {generator!r}",
        )
        is_whole = not isinstance(generator, list) or len(generators) == num_models
        require(is_whole, f"a list of generators needs one for each of the {num_models} models, got {len(generators)}")
        given = tuple(latents.shape) if isinstance(latents, torch.Tensor) else latents
        require(
            given is None or given is not latents and given == shape,
            f"latents must be a tensor of shape {shape}, got {given!r:.100}",
        )
        require(not unknown, f"callbacks can have {self._callback_tensor_inputs}, not {unknown}")
        if output_type == "model":
            self.need_base_model("output_type='model'")
        if not isinstance(generator, list):
            # All from one, so that the noise of a model depends on its index alone, and the first models of a larger
            # sample are those of a smaller one.
            source = generator.device if generator is not None else "cpu"
            seeds = torch.randint(2**62, (num_models,), generator=generator, device=source).tolist()
            generators = [torch.Generator(source).manual_seed(seed) for seed in seeds]
        device, embedding = self._execution_device, known
        if known is not None and not isinstance(condition, torch.Tensor):
            embedding = embed_conditions(self.condition_encoder, known.to(device), generators)
        if latents is None:
            latents = randn_tensor(shape, generator=generators, device=device, dtype=torch.float32)
        scheduler = copy.deepcopy(self.scheduler)  # it keeps state from step to step, and calls may overlap
        # On the CPU, where schedulers read them: to read one on a device is to wait for all that is queued there.
        try:
            scheduler.set_timesteps(num_inference_steps, device="cpu")
        except Exception as error:  # what schedulers raise has no common type
            name = type(scheduler).__name__
            raise ValueError(f"{name} cannot take {num_inference_steps} denoising steps: {error!r}") from error
        latents = latents.to(device, torch.float32) * scheduler.init_noise_sigma * temperature
        # Schedulers of ordinary differential equations add no noise, and some of them take no generator.
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        extra = {"generator": generators} if takes_generator else {}

        length, dtype = latents.shape[1], self.denoiser.dtype

        def denoise(rows: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            rows = rows.to(dtype)
            rows, given = rows[:, :length], rows[:, length:] if rows.shape[1] > length else None
            predicted = self.denoiser(rows, timestep, given).sample
            if guidance_scale == 1:
                return predicted
            without = self.denoiser(rows, timestep).sample
            return without + guidance_scale * (predicted - without)

        def beside(latents: torch.Tensor) -> torch.Tensor:
            """Latents and embeddings side by side, `(N, L + E)`, so that both are cut into the same blocks."""
            return latents if embedding is None else torch.cat([latents, embedding.to(latents)], dim=1)

        def on_step_end(step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
            if callback_on_step_end is None:
                return latents
            values = {"latents": latents}
            values = {name: values[name] for name in callback_on_step_end_tensor_inputs}
            return (callback_on_step_end(self, step, timestep, values) or {}).get("latents", latents)

        if loss_fn is not None:
            latents = guided_latents(
                denoise,
                self.autoencoder,
                scheduler,
                beside(latents),
                generators,
                group_size,
                lambda parameters: -loss_guidance_scale * check_losses(loss_fn(parameters), parameters),
                on_step_end,
                self.progress_bar,
            )
        else:
            in_parts, on_device = InParts("networks"), scheduler.timesteps.to(latents.device)
            for step, timestep in enumerate(self.progress_bar(scheduler.timesteps)):
                rows = beside(scheduler.scale_model_input(latents, timestep))
                blocks = in_blocks(functools.partial(denoise, timestep=on_device[step]), rows, length, in_parts)
                # The step is taken for all networks at once, because schedulers keep state from step to step.
                prediction = torch.cat(list(blocks)).float()
                latents = scheduler.step(prediction, timestep, latents, **extra).prev_sample
                latents = on_step_end(step, timestep, latents)

        output = latents.cpu()
        if output_type != "latent":
            output = self.decode(latents, output_type, batch_norm_data=batch_norm_data)
        self.maybe_free_model_hooks()
        return PDiffPipelineOutput(parameters=output) if return_dict else (output,)

    def compile(self, **kwargs: Any) -> None:
        """
        Compiles what takes the time, the denoiser and the network of the decoder, at their first use and for each shape
        that they meet. Takes the arguments of `torch.compile`. The bits of networks may then differ from those without.
        """
        self.denoiser.compile(**kwargs)
        if self.autoencoder.config.block_out_channels:
            self.autoencoder.decoder.compile(**kwargs)
