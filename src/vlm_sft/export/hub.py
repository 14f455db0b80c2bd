"""Uploads an export to the Hugging Face Hub with its standard client, when asked to."""

from __future__ import annotations

from pathlib import Path

from vlm_sft.common.errors import RunError


def push(folder: Path, repository: str, private: bool) -> str:
    """Make a repository where there is none, and upload a folder into it.

    Args:
        folder: the export.
        repository: "owner/name".
        private: whether a new repository is private; an existing one stays as it is.

    Returns:
        Address of the repository.

    Raises:
        RunError: the Hub refuses or cannot be reached; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload with vlm-sft export")
    except Exception as error:  # the client's transport has errors of its own, which differ between its versions
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunError(
            f"--push_to_hub {repository}: {first}",
            f"log in with `hf auth login` or set HF_TOKEN, check the name and the network; {folder} is complete, and "
            f"`hf upload {repository} {folder}` uploads it later",
        ) from error
    return str(address)
