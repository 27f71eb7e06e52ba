"""Finding a model's folder: a path, the embedded model, or a hub id, downloaded through huggingface_hub.

huggingface_hub resumes what was cut off, keeps its files below HF_HOME, takes its token from HF_TOKEN or the login, and
stays offline with HF_HUB_OFFLINE=1, when only what is downloaded already is found.
"""

from __future__ import annotations

import re
from pathlib import Path

from burnish.config import UserError

ASSETS = Path(__file__).parent.parent / "assets"
WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
HUB_ID = re.compile(r"(?:[\w.-]+/)?[\w.-]+(?:@[\w./-]+)?")


def resolve(source: str | Path) -> Path:
    """The folder of a model: a local path, "pebble" for the embedded model, or a hub id, downloaded if needed; a GGUF
    file itself.

    A hub id is `owner/name`, or `owner/name@revision` for a branch, tag or commit. Raises UserError for what is none of
    them, for a model that cannot be had, and for one that has no safetensors.
    """
    path = Path(source)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if (ASSETS / str(source) / "config.json").exists():
        return ASSETS / str(source)
    if path.is_file():
        raise UserError(f"{path}: a file, where a checkpoint folder is needed, or a file named .gguf")
    if path.suffix == ".gguf":
        raise UserError(f"{path}: no such file")
    if isinstance(source, Path) or not HUB_ID.fullmatch(source) or source.startswith("."):
        raise UserError(f"{source}: no such folder, and not a hub id of the form owner/name")
    return _download(*source.partition("@")[::2])


def _download(name: str, revision: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    shown = f"{name}@{revision}" if revision else name
    try:
        # the top folder only: others hold the same weights for other programs
        folder = snapshot_download(name, revision=revision or None, allow_patterns=WANTED, ignore_patterns=["*/*"])
    except errors.GatedRepoError:
        raise UserError(f"{shown}: gated; ask for access on its hub page, then set HF_TOKEN to your token") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{shown}: no such folder, and the hub has no such model (for a private one, set HF_TOKEN to your token)"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{name}: the hub knows no revision '{revision}' of it; name a branch, tag or commit") from None
    except errors.LocalEntryNotFoundError as error:
        why = "the hub cannot be reached; connect, or give a local folder"
        if "offline" in str(error).lower():
            why = "HF_HUB_OFFLINE is set, and it is not downloaded; unset it, or give a local folder"
        raise UserError(f"{shown}: no such folder, and {why}") from None
    except Exception as error:  # network libraries raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{shown}: no such folder, and the hub gave: {reason}") from None
    found = Path(folder)
    if not any(found.glob("*.safetensors")):
        raise UserError(
            f"{shown}: its repository has no safetensors; a pickle can run code when it is read, so convert it where "
            f'you trust it: python -c "import transformers as t; c = t.AutoConfig.from_pretrained({name!r}); '
            f"getattr(t, c.architectures[0]).from_pretrained({name!r}).save_pretrained('converted')\""
        )
    return found
