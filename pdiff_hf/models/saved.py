"""What the autoencoder and the denoiser have in common when they are saved and loaded."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from diffusers import ModelMixin
from huggingface_hub.errors import HTTPError

from ..layout import LayoutError
from ..utils.errors import first_line
from ..utils.files import permit, remove

if TYPE_CHECKING:
    from typing_extensions import Self

# Goes up when a release can no longer read what an older one has written, or the other way round. Files without a
# version are of format 1.
FORMAT_VERSION = 1


def check_format_version(version: int) -> None:
    """Raises a `ValueError` for files of a format that this release cannot read."""
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"it was saved in format {version!r:.100}, and this release of pdiff_hf reads formats up to "
            f"{FORMAT_VERSION}; upgrade pdiff_hf (pip install --upgrade pdiff_hf)"
        )


@contextlib.contextmanager
def replaced_files(folder: Path, *patterns: str) -> Iterator[Path]:
    """
    An empty folder to write into. When the block ends without an exception, what is in it comes to `folder`, after all
    that matches one of `patterns` there has been removed: files of another format would be loaded in place of new ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / ".part"
    remove(part)
    part.mkdir()
    try:
        yield part
        permit(part)
        for pattern in patterns:
            for old in folder.glob(pattern):
                remove(old)
        for new in part.iterdir():
            new.replace(folder / new.name)
    finally:
        remove(part)


class SavedModel(ModelMixin):
    """A `ModelMixin` that is saved and loaded whole or not at all, and whose statistics stay float32."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "Self":
        """Moves and casts, by `to` and `half` for example, all but the types of `_keep_in_fp32_modules`."""
        names = self._keep_in_fp32_modules or []
        kept = {name: buffer for name, buffer in self._buffers.items() if name in names}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            if buffer is not None and self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Like diffusers' own, but an earlier model in the folder goes, whatever format it was saved in."""
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        with replaced_files(Path(save_directory), "diffusion_pytorch_model*", self.config_name) as part:
            super().save_pretrained(part, *args, **kwargs)

    # A pipeline looks at the signature to learn what it can ask for.
    save_pretrained.__wrapped__ = ModelMixin.save_pretrained  # type: ignore[attr-defined]

    @classmethod
    def from_config(cls, config: dict, **kwargs: Any):
        """
        Like diffusers' own.

        Raises:
            ValueError: if the network that the config describes cannot be, or does not fit into this machine's memory;
                no memory has been taken by then.
        """
        try:
            with torch.device("meta"):
                built = super().from_config(config, **kwargs)
        except ValueError:
            raise
        except Exception as error:  # what wrong settings make the layers of torch raise has no common type
            raise ValueError(f"{cls.__name__}'s config does not describe a network ({first_line(error)})") from error
        model = built[0] if isinstance(built, tuple) else built
        needed = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        available = psutil.virtual_memory().available
        if needed > available:
            raise ValueError(
                f"{cls.__name__}'s config describes a network of {needed / 1e9:,.1f} GB, and this machine has "
                f"{available / 1e9:,.1f} GB of free memory"
            )
        return super().from_config(config, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any):
        """
        Like diffusers' own, but all tensors have to be there, and finite.

        Raises:
            OSError: if there are no such files, or they cannot be read.
            HTTPError: of `huggingface_hub.errors`, if the connection to the Hub fails.
            ValueError: if they are damaged, do not belong together, or are of a newer format than this release reads.
        """
        path, wants_info = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        folder = Path(path, kwargs.get("subfolder") or "")

        def refused(what: str) -> ValueError:
            return ValueError(f"the {cls.__name__} in '{path}' cannot be used: {what}")

        if folder.is_dir() and not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin")):
            if kwargs.get("use_safetensors"):
                raise OSError(f"'{folder}' has .bin files and no safetensors files, as use_safetensors=True asks for")
            kwargs["use_safetensors"] = False  # torch reads tensors from them, and runs no code
        try:
            model, info = super().from_pretrained(path, output_loading_info=True, **kwargs)
        except (OSError, HTTPError):
            raise
        except Exception as error:  # what damaged files make diffusers raise has no common type
            raise refused(str(error) if type(error) in (ValueError, LayoutError) else first_line(error)) from error
        if wrong := {what: names for what, names in info.items() if names}:
            raise refused(f"config and weights differ: {wrong}")
        for name, tensor in model.state_dict().items():
            # Without a copy of the tensor, as `isfinite` makes.
            if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
                raise refused(f"'{name}' has values that are not finite")
        return (model, info) if wants_info else model
