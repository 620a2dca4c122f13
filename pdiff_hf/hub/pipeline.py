"""How a pipeline is saved, loaded and pushed."""

import contextlib
import inspect
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import compare_versions
from diffusers import SchedulerMixin
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..models.saved import replaced_files
from ..networks.adapters import ADAPTER_FOLDER, find_reference, has_adapters, plain_network, save_adapter
from ..utils.errors import first_line, limited_modules
from ..utils.files import is_disk_full
from ..utils.names import TUNING, generator_folder
from .push import PIPELINE_FILE, PushOptions, push_pipeline_to_hub

# The longest schedule that is loaded: schedulers allocate memory for all steps. The longest ones in use have 1000.
MAX_SCHEDULER_NUMBER = 1_000_000
# That a pipeline's index may name classes of.
LIBRARIES = ("diffusers", "pdiff_hf", "transformers")


def _no_pipeline(name: str | os.PathLike, reason: str) -> OSError:
    return OSError(
        f"'{name}' is neither the folder of a finished run or of a saved pipeline, nor the id of one on the Hub: "
        f"{reason}"
    )


def _check_repo_id(name: str | os.PathLike) -> None:
    """Raises an `OSError` for what cannot be the id of a repository; it is most often the folder that is misspelled."""
    try:
        validate_repo_id(os.fspath(name))
    except HFValidationError as error:
        raise _no_pipeline(name, "there is no such folder") from error


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline as Base
    from typing_extensions import Self, Unpack
else:  # diffusers takes a `pipeline.py` only if there is one class of pipelines in it
    Base = object


class SavedPipeline(Base):
    """A pipeline that is saved and loaded whole or not at all; it comes before `DiffusionPipeline` among the bases."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "Self":
        """
        Like diffusers' own; the folder of a run gives its generator, tuned if it was. Weights are read from safetensors
        files, and where there are none from `.bin` files, of which torch reads tensors alone; `use_safetensors=True`
        takes no others.

        Raises:
            OSError: if there is no such folder or repository, or a file is missing or cannot be read.
            HTTPError: of `huggingface_hub.errors`, if the connection to the Hub fails.
            ValueError: if files are damaged, do not belong together, or are of a newer format than this release reads.
        """
        source = Path(pretrained_model_name_or_path)
        if source.is_dir() and not (source / cls.config_name).is_file():
            source = generator_folder(source)
            if not (source / cls.config_name).is_file():
                raise _no_pipeline(pretrained_model_name_or_path, f"it has no {cls.config_name}")
            pretrained_model_name_or_path = str(source)
        if not source.is_dir():
            _check_repo_id(pretrained_model_name_or_path)
        # Not False for all: transformers writes no `.bin` files any more. Every component finds out what there is.
        use_safetensors = kwargs.pop("use_safetensors", None) or None
        if "dtype" in kwargs and compare_versions("diffusers", "<", "0.40"):
            kwargs["torch_dtype"] = kwargs.pop("dtype")
        try:
            with limited_modules():
                return super().from_pretrained(pretrained_model_name_or_path, use_safetensors=use_safetensors, **kwargs)
        except (OSError, ValueError, HTTPError):
            raise
        except ImportError as error:
            raise ValueError(
                f"the pipeline in '{pretrained_model_name_or_path}' needs a package that is not installed: {error}"
            ) from error
        except Exception as error:  # what damaged files make diffusers and transformers raise has no common type
            what = f"the pipeline in '{pretrained_model_name_or_path}' cannot be used"
            raise ValueError(f"{what}: {first_line(error)}") from error

    @classmethod
    def download(cls, pretrained_model_name: str | os.PathLike, **kwargs) -> str:
        """
        Like diffusers' own; the folder of a pipeline on the Hub, from the cache or after it is downloaded.

        Raises:
            OSError: if there is no such repository, or one of its files is not available.
            HTTPError: of `huggingface_hub.errors`, if the connection to the Hub fails.
            ValueError: if it has code that is not trusted.
        """
        _check_repo_id(pretrained_model_name)
        try:
            folder = super().download(pretrained_model_name, **kwargs)
        except OSError as error:
            if is_disk_full(error):
                raise
            raise _no_pipeline(pretrained_model_name, first_line(error)) from error
        # The adapters beside a base model, and how it was tuned, which are no components of a pipeline.
        names = ("cache_dir", "token", "local_files_only")
        known: dict[str, Any] = {name: kwargs[name] for name in names if name in kwargs}
        patterns, revision = [f"base_model/{ADAPTER_FOLDER}/*", TUNING], Path(folder).name
        with contextlib.suppress(LocalEntryNotFoundError):
            snapshot_download(str(pretrained_model_name), revision=revision, allow_patterns=patterns, **known)
        return folder

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """The index of a saved pipeline, as diffusers asks for it before it loads the components."""
        config = super().load_config(pretrained_model_name_or_path, **kwargs)
        # Older releases of diffusers import whatever module an index names.
        for name, value in (config[0] if isinstance(config, tuple) else config).items():
            library = value[0] if isinstance(value, list | tuple) and len(value) == 2 else None
            if isinstance(library, str) and library.partition(".")[0] not in LIBRARIES:
                raise ValueError(
                    f"'{pretrained_model_name_or_path}' names {library}.{value[1]} as its {name}; components are "
                    f"loaded from {', '.join(LIBRARIES)} alone"
                )
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
        Like diffusers' own, but the file of the pipeline's class goes with the components, as `pipeline.py`, and an
        earlier pipeline in the folder is replaced whole, whatever format and variant it was saved in. With
        `push_to_hub=True`, `kwargs` are those of [`push_to_hub`], and `repo_id` is the folder's name by default.
        """
        with replaced_files(Path(save_directory), *self.components, self.config_name, PIPELINE_FILE) as part:
            if has_adapters(self.base_model):
                self._save_with_adapters(part, safe_serialization, variant, max_shard_size)
            else:
                super().save_pretrained(part, safe_serialization, variant, max_shard_size)
            shutil.copyfile(inspect.getfile(type(self)), part / PIPELINE_FILE)
        if push_to_hub:
            push_pipeline_to_hub(save_directory, **{"repo_id": Path(save_directory).name} | kwargs)

    def _save_with_adapters(self, folder: Path, *args) -> None:
        """
        Saves a pipeline whose base model has adapters: with its tensors under its own names and the adapters beside it,
        or by reference if the Hub has it.
        """
        base, reference = self.base_model, find_reference(self.base_model)
        try:
            self.register_modules(base_model=None if reference else plain_network(base))
            self.register_to_config(base_model_reference=reference)
            super().save_pretrained(folder, *args)
        finally:
            self.register_modules(base_model=base)
        if reference is None:
            save_adapter(base, folder / "base_model" / ADAPTER_FOLDER)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        safe_serialization: bool = True,
        variant: str | None = None,
        **options: "Unpack[PushOptions]",
    ) -> str:
        """
        Like diffusers' own, but in one commit with the file of the pipeline's class, as `pipeline.py`, and with a model
        card that says what the pipeline generates. A card that the repository has already is kept. Returns the commit's
        address. `options` are those of [`~pdiff_hf.hub.push.PushOptions`].

        Raises:
            HubError: if it cannot be pushed; no partial upload is published, and the push can be repeated.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization, variant)
            return push_pipeline_to_hub(folder, repo_id, **options)
