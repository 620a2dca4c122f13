"""What is made of sampled parameters: networks, ensembles, and networks for a few labelled examples."""

import functools
import itertools
import logging
import math
import numbers
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from pdiff_hf.layout import ParameterLayout
from pdiff_hf.models import ParameterAutoencoder
from pdiff_hf.models.condition import Condition
from pdiff_hf.models.fields import plain
from pdiff_hf.networks.adapters import load_reference, with_adapters
from pdiff_hf.networks.batch_norm import RecomputedStatistics
from pdiff_hf.networks.ensemble import EnsembleModel
from pdiff_hf.networks.posterior import (
    FEW,
    LossFunction,
    PosteriorOutput,
    Predict,
    check_examples,
    effective_sample_size,
    example_loss,
    log_likelihoods,
    logits_of,
    posterior_weights,
    refine,
    resample,
)
from pdiff_hf.networks.replacement import Replacement
from pdiff_hf.networks.runner import Forward, NetworkRunner
from pdiff_hf.pipelines.conditions import list_conditions
from pdiff_hf.pipelines.inputs import prepare_inputs

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline as Base
else:  # diffusers takes a `pipeline.py` only if there is one class of pipelines in it
    Base = object

logger = logging.getLogger(__name__)


class NetworkMixin(Base):
    """For a pipeline that samples parameters of shape `(N, D)`."""

    autoencoder: ParameterAutoencoder
    base_model: nn.Module | None
    processor: Any

    def recompute_statistics(
        self, parameters: torch.Tensor, batch_norm_data: Iterable[Mapping[str, Any]] | None
    ) -> tuple[ParameterLayout, torch.Tensor]:
        """
        Networks with their own statistics of batch norm; see [`RecomputedStatistics`].

        Args:
            parameters (`torch.Tensor`): Shape `(N, D)`.
            batch_norm_data (`Iterable[Mapping]`, *optional*): Batches of training data, each what the base model takes.
                It is gone through twice, and must give the same. Without it the base model's statistics stay, with a
                warning where the generator was evaluated otherwise.

        Returns:
            `tuple`: The layout of what differs between the networks, and its values, shape `(N, D + S)`.

        Raises:
            ValueError: if there are no statistics to recompute, or no batches.
        """
        layout = self.autoencoder.layout
        if batch_norm_data is None:
            if self.config.recomputed_statistics:
                logger.warning(
                    "this generator was evaluated with statistics of batch norm that were recomputed for each network, "
                    "and these networks have the base model's; pass batch_norm_data, some batches of training data"
                )
            return layout, parameters
        if iter(batch_norm_data) is batch_norm_data:
            raise ValueError("batch_norm_data is gone through twice: pass a list of batches or a DataLoader")
        assert self.base_model is not None  # checked before sampling
        model = self.base_model

        def batches() -> Iterator[Forward]:
            for batch in batch_norm_data:
                prepared = self.prepare(batch).items()
                inputs = {name: value for name, value in prepared if isinstance(value, torch.Tensor)}
                yield functools.partial(_run, inputs=inputs)

        statistics = RecomputedStatistics(model, layout, batches)
        return statistics.layout, statistics(parameters)

    def prepare(self, examples: Mapping[str, Any]) -> dict[str, Any]:
        """
        What people have, as the base model and the generated networks take it: `network(**pipe.prepare({"images":
        [image]}))`. What may be in `examples` is said in [`prepare_inputs`].

        Raises:
            ValueError: if there is no base model, or nothing says how to prepare an input.
        """
        return prepare_inputs(examples, self.need_base_model("the preparation of inputs"), self.processor)

    def make_model(self, state_dict: dict[str, torch.Tensor]) -> nn.Module:
        """
        The base model with the tensors of `state_dict`, in its own types and under all names of their memory. All other
        tensors are shared with it, not copied.
        """
        model = self.need_base_model("a network")
        return Replacement(model, state_dict).network(model, state_dict)

    def load_base_model(self, **kwargs: Any) -> nn.Module:
        """
        The base model that the generator names, with adapters, from the Hub or its cache. It becomes a component, and
        is loaded with the arguments given here, such as `dtype`, `device_map` or `quantization_config`, or else as the
        adapters were made for, when a network is first asked for.

        Raises:
            ValueError: if the generator names no base model.
            OSError: if it is not available.
        """
        reference = self.config.base_model_reference
        if not reference:
            raise ValueError("this generator names no base model on the Hub; pass base_model=...")
        model = with_adapters(load_reference(reference, **kwargs), self.autoencoder.layout)
        self.autoencoder.layout.check_fits(model.state_dict())
        self.register_modules(base_model=model)
        return model

    def need_base_model(self, what: str) -> nn.Module:
        """The base model, which is loaded if the generator names one; a `ValueError` for `what` if there is none."""
        if self.base_model is None and self.config.base_model_reference:
            self.load_base_model().to(self._execution_device)
        if self.base_model is None:
            raise ValueError(f"{what} needs a base model, and this pipeline has none; pass base_model=...")
        return self.base_model

    def ensemble(
        self,
        num_models: SupportsIndex = 10,
        num_inference_steps: SupportsIndex | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        condition: Condition | Sequence[Condition] | torch.Tensor | None = None,
        temperature: float | None = None,
        batch_norm_data: Iterable[Mapping[str, Any]] | None = None,
    ) -> EnsembleModel:
        """
        New networks as one `nn.Module` that returns the mean of their probabilities, on the base model's device.
        Arguments and errors are those of the call; the networks are those that it gives for the same arguments.

        Raises:
            ValueError: if the pipeline has no base model.
        """
        model = self.need_base_model("an ensemble")
        (parameters,) = self(
            num_models,
            num_inference_steps,
            generator,
            condition=condition,
            temperature=temperature,
            output_type="pt",
            return_dict=False,
        )
        return EnsembleModel(model, *self.recompute_statistics(parameters, batch_norm_data))

    def posterior(
        self,
        examples: Mapping[str, Any],
        num_candidates: int = 2048,
        num_models: int = 64,
        condition: Condition | Sequence[Condition] | None = None,
        refine_steps: int = 0,
        *,
        temperature: float = 1.0,
        candidates: torch.Tensor | None = None,
        refine_learning_rate: float = 1e-3,
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
        predict: Predict = logits_of,
        loss: str = "nll",
        sigma: float | None = None,
    ) -> PosteriorOutput:
        r"""
        Networks for a task of which a few labelled examples are known: samples candidates, weights them by the
        likelihood of the labels, and draws from them. `EnsembleModel(pipe.base_model, pipe.autoencoder.layout,
        output.parameters, output.weights)` is their prediction. Candidates are decoded and scored in blocks, so that
        memory grows with the number of their latents only.

        Args:
            examples (`Mapping`): `labels` of shape `(B,)`, and `images`, `text` or what the network takes; see
                [`prepare`].
            num_candidates (`int`, *optional*, defaults to 2048): How many networks to sample.
            num_models (`int`, *optional*, defaults to 64): How many to draw from them; the same may come several times.
            condition (`Mapping` or list of them, *optional*): What else is known of the task; the rest is drawn from
                the seen conditions. Several share the candidates evenly: fresh draws, for a generator that was tuned on
                any task of a family, took 20 labels from 80.3% to 84.0%.
            refine_steps (`int`, *optional*, defaults to 0): Steps of fine-tuning on the examples, for all drawn. With
                few examples it overfits: 50 steps on 20 labels took networks from 86.1% to 83.1%.
            temperature (`float`, *optional*, defaults to 1): Above 1, the examples count less.
            candidates (`torch.Tensor`, *optional*): More candidates, shape `(M, D)`, such as the training networks.
            refine_learning_rate (`float`, *optional*, defaults to 1e-3): Of AdamW.
            num_inference_steps (`int`, *optional*): Denoising steps, by default the pipeline's. They take most of the
                time, and what is weighted afterwards needs fewer than what is used as it is.
            predict (`Callable`, *optional*): `predict` of a task, for networks that are not of transformers.
            loss (`str`, *optional*, defaults to `"nll"`): Of classes; `"mse"` for labels that are values, floats of
                shape `(B, C)`, such as the half of an image that is known: examples of a neural field are
                `{"coordinates": ..., "labels": ...}`.
            sigma (`float`, *optional*): With `"mse"`, the standard deviation of the errors of labels.

        Raises:
            ValueError: for arguments out of range, and if there is no base model or no usable candidate.
        """
        base_model = self.need_base_model("a posterior")
        num_models, layout = whole_number("num_models", num_models), self.autoencoder.layout
        refine_steps = whole_number("refine_steps", refine_steps) if refine_steps else 0
        per_condition = whole_number("num_candidates", num_candidates)
        if condition is not None and not isinstance(condition, torch.Tensor):
            condition = list_conditions(condition, self.condition_encoder)
        num_conditions = 1 if condition is None else max(1, len(condition))
        examples = self.prepare(examples)
        check_examples(examples, loss, sigma)
        shape = None if candidates is None else tuple(candidates.shape)
        require(
            per_condition % num_conditions == 0,
            f"{num_candidates} candidates cannot be shared by {num_conditions} conditions evenly",
        )
        temperature = finite_number("temperature", temperature, positive=True)
        refine_learning_rate = finite_number("refine_learning_rate", refine_learning_rate, positive=True)
        require(
            shape is None or len(shape) == 2 and shape[1] == layout.num_parameters,
            f"candidates must have shape (M, {layout.num_parameters}), got {shape}",
        )
        per_condition //= num_conditions
        (latents,) = self(
            per_condition, num_inference_steps, generator, condition=condition, output_type="latent", return_dict=False
        )

        models = NetworkRunner(base_model, layout)
        parts = itertools.chain(self.decode_in_blocks(latents), [] if candidates is None else [candidates])
        log_likelihood = torch.cat([log_likelihoods(models, examples, part, predict, sigma) for part in parts])
        weights = posterior_weights(log_likelihood, temperature)
        if (size := effective_sample_size(weights)) < FEW:
            logger.warning(
                "the effective sample size is %.1f of %d candidates: take more candidates, a condition that says more, "
                "or a temperature above %g",
                size,
                len(weights),
                temperature,
            )
        chosen, counts = resample(weights, num_models, generator).unique_consecutive(return_counts=True)
        parameters = self.decode_latents(latents[chosen[chosen < len(latents)]])
        if candidates is not None:
            given = chosen[chosen >= len(latents)] - len(latents)
            parameters = torch.cat([parameters, candidates[given.to(candidates.device)].to(parameters)])
        if refine_steps:
            parameters = refine(
                base_model,
                layout,
                parameters,
                examples,
                num_steps=refine_steps,
                learning_rate=refine_learning_rate,
                predict=predict,
                sigma=sigma,
            )
        return PosteriorOutput(parameters, counts / num_models, size, log_likelihood[chosen])

    def example_loss(
        self,
        examples: Mapping[str, Any],
        *,
        predict: Predict = logits_of,
        loss: str = "nll",
        sigma: float | None = None,
    ) -> LossFunction:
        """
        A `loss_fn` of labelled examples for the pipeline's call: their negative log-likelihood under each network.
        Arguments are those of [`~pdiff_hf.networks.posterior.example_loss`], and `loss` as for [`posterior`].

        Raises:
            ValueError: for examples without labels, and if the pipeline has no base model.
        """
        base_model, layout = self.need_base_model("a loss of examples"), self.autoencoder.layout
        prepared = self.prepare(examples)
        check_examples(prepared, loss, sigma)
        return example_loss(base_model, layout, prepared, predict=predict, sigma=sigma)


def _run(call: Callable, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Some tensor that a network returns, for the sake of what happens on the way to it."""
    return next(leaf for leaf in tree_leaves(call(**inputs)) if isinstance(leaf, torch.Tensor))


def require(is_right: bool, message: str) -> None:
    """Raises a `ValueError` with the message if an argument is not right."""
    if not is_right:
        raise ValueError(message)


def whole_number(name: str, value: SupportsIndex) -> int:
    """`value`, of any type of whole numbers, as an `int` of at least 1."""
    number = 0 if isinstance(value, bool) or not hasattr(value, "__index__") else operator.index(value)
    require(number >= 1, f"{name} must be a whole number of at least 1, got {value!r}")
    return number


def finite_number(name: str, value: Any, *, positive: bool = False) -> float:
    """`value`, of any type of numbers, as a finite `float` of at least 0, or above."""
    number = plain(value)
    number = float(number) if isinstance(number, numbers.Real) else math.nan
    is_right = 0 <= number < math.inf and (number > 0 or not positive)
    require(
        is_right, f"{name} must be {'above 0 and finite' if positive else 'finite and at least 0'}, got {value!r:.100}"
    )
    return number
