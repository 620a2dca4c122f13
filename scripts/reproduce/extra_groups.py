"""Groups of networks that only a table of the paper compares with."""

from collections.abc import Callable, Iterator, Mapping

import torch

from pdiff_hf.evaluation.geometry import Rows
from pdiff_hf.evaluation.groups import Group
from pdiff_hf.evaluation.single_task import SingleTask
from pdiff_hf.run.context import RunContext
from pdiff_hf.run.learning import learn_autoencoder
from pdiff_hf.utils.seeds import named_seed

from .hyper_representations import sample_hyper_representations
from .vae import VariationalAutoencoder


def hyper_representations(run: RunContext, compared: SingleTask) -> Iterator[Group]:
    """Table 7: as many networks as are generated for each of S_KDE30, SANE_SUB and SANE_KDE30."""
    r, seen = run.config, Rows(run.parameters, ~run.heldout)
    return sample_hyper_representations(compared.scorer, seen, run.pipeline.autoencoder, r.num_models, r.seed)


def vae(run: RunContext, compared: SingleTask) -> Iterator[Group]:
    """Table 8: the prior of a variational autoencoder that is trained as the generator's own, but with the KL term."""
    r = run.config
    with run.loop(run.stages["evaluate"]) as loop:
        autoencoder, _ = learn_autoencoder(run, loop, model_class=VariationalAutoencoder)
    generator = torch.Generator().manual_seed(named_seed(r.seed, "vae"))
    assert isinstance(autoencoder, VariationalAutoencoder)
    yield Group("vae", autoencoder.sample_prior(r.baseline_models, generator).cpu(), sweep="VAE")


EXTRA_GROUPS: Mapping[str | None, Callable[[RunContext, SingleTask], Iterator[Group]]] = {
    "hyper_representations": hyper_representations,
    "vae": vae,
}
