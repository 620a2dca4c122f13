"""What is made of sampled parameters: networks, ensembles, and networks for a few labelled examples."""

import functools
import logging
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from pdiff_hf.layout import ParameterLayout
from pdiff_hf.models import ParameterAutoencoder
from pdiff_hf.models.condition import Condition
from pdiff_hf.networks.batch_norm import RecomputedStatistics
from pdiff_hf.networks.batched import Forward
from pdiff_hf.networks.ensemble import EnsembleModel
from pdiff_hf.networks.posterior import (
    PosteriorOutput,
    Predict,
    check_examples,
    predict_logits,
    refine,
    select_by_likelihood,
)
from pdiff_hf.networks.replacement import Replacement

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline as Base
else:  # diffusers takes a `pipeline.py` only if there is one class of pipelines in it
    Base = object

logger = logging.getLogger(__name__)


class NetworkMixin(Base):
    """For a pipeline that samples parameters of shape `(N, D)`."""

    autoencoder: ParameterAutoencoder
    base_model: nn.Module | None

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
        device = next(model.parameters()).device

        def batches() -> Iterator[Forward]:
            for batch in batch_norm_data:
                inputs = {name: value.to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
                yield functools.partial(_run, inputs=inputs)

        statistics = RecomputedStatistics(model, layout, batches)
        return statistics.layout, statistics(parameters)

    def make_model(self, state_dict: dict[str, torch.Tensor]) -> nn.Module:
        """
        The base model with the tensors of `state_dict`, in its own types and under all names of their memory. All other
        tensors are shared with it, not copied.
        """
        if self.base_model is None:
            raise ValueError("this pipeline has no base model that the generated tensors could be put into")
        return Replacement(self.base_model, state_dict).network(self.base_model, state_dict)

    def ensemble(
        self,
        num_models: SupportsIndex = 10,
        num_inference_steps: SupportsIndex = 20,
        generator: torch.Generator | list[torch.Generator] | None = None,
        condition: Condition | Sequence[Condition] | torch.Tensor | None = None,
        temperature: float = 1.0,
        batch_norm_data: Iterable[Mapping[str, Any]] | None = None,
    ) -> EnsembleModel:
        """
        New networks as one `nn.Module` that returns the mean of their probabilities, on the base model's device.
        Arguments and errors are those of the call; the networks are those that it gives for the same arguments.

        Raises:
            ValueError: if the pipeline has no base model.
        """
        if self.base_model is None:
            raise ValueError("an ensemble needs a base model, and this pipeline has none; pass base_model=...")
        (parameters,) = self(
            num_models,
            num_inference_steps,
            generator,
            condition=condition,
            temperature=temperature,
            output_type="pt",
            return_dict=False,
        )
        return EnsembleModel(self.base_model, *self.recompute_statistics(parameters, batch_norm_data))

    def posterior(
        self,
        examples: Mapping[str, Any],
        num_candidates: int = 2048,
        num_models: int = 64,
        condition: Condition | None = None,
        refine_steps: int = 0,
        *,
        temperature: float = 1.0,
        candidates: torch.Tensor | None = None,
        num_inference_steps: int = 20,
        generator: torch.Generator | None = None,
        predict: Predict = predict_logits,
    ) -> PosteriorOutput:
        r"""
        Networks for a task of which a few labelled examples are known: samples candidates, weights them by the
        likelihood of the labels, and draws from them. `EnsembleModel(pipe.base_model, pipe.autoencoder.layout,
        output.parameters, output.weights)` is their prediction.

        Args:
            examples (`Mapping`): A batch of the task with `labels`, int64 of shape `(B,)`; the rest is for the network.
            num_candidates (`int`, *optional*, defaults to 2048): How many networks to sample.
            num_models (`int`, *optional*, defaults to 64): How many to draw from them; the same may come several times.
            condition (`Mapping`, *optional*): What else is known of the task; the rest is drawn.
            refine_steps (`int`, *optional*, defaults to 0): Steps of fine-tuning on the examples, for all drawn.
            temperature (`float`, *optional*, defaults to 1): Above 1, the examples count less.
            candidates (`torch.Tensor`, *optional*): More candidates, shape `(M, D)`, such as the training networks.
            predict (`Callable`, *optional*): `predict` of a task, for networks that are not of transformers.

        Raises:
            ValueError: for arguments out of range, and if there is no base model or no usable candidate.
        """
        if self.base_model is None:
            raise ValueError("a posterior needs a base model, and this pipeline has none; pass base_model=...")
        num_models, layout = whole_number("num_models", num_models), self.autoencoder.layout
        check_examples(examples)
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
        if refine_steps:
            refine_steps = whole_number("refine_steps", refine_steps)
        if candidates is not None and (candidates.ndim != 2 or candidates.shape[1] != layout.num_parameters):
            raise ValueError(f"candidates must have shape (M, {layout.num_parameters}), got {tuple(candidates.shape)}")
        (sampled,) = self(
            num_candidates, num_inference_steps, generator, condition=condition, output_type="pt", return_dict=False
        )
        output = select_by_likelihood(
            self.base_model,
            layout,
            sampled if candidates is None else torch.cat([sampled, candidates]),
            examples,
            num_models,
            temperature=temperature,
            generator=generator,
            predict=predict,
        )
        if refine_steps:
            output.parameters = refine(
                self.base_model, layout, output.parameters, examples, num_steps=refine_steps, predict=predict
            )
        return output


def _run(call: Callable, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Some tensor that a network returns, for the sake of what happens on the way to it."""
    return next(leaf for leaf in tree_leaves(call(**inputs)) if isinstance(leaf, torch.Tensor))


def whole_number(name: str, value: SupportsIndex) -> int:
    """`value`, of any type of whole numbers, as an `int` of at least 1."""
    number = 0 if isinstance(value, bool) or not hasattr(value, "__index__") else operator.index(value)
    if number < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    return number
