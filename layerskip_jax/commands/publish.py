"""``layerskip publish FOLDER REPO_ID`` pushes an exported folder to the Hugging Face Hub."""

import fnmatch

from etils import epath

from layerskip_jax.checkpoint.huggingface.llama_folder import LlamaFolder
from layerskip_jax.checkpoint.reading import open_model_folder
from layerskip_jax.command_line import make_parser
from layerskip_jax.commands.model_card import CARD
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.errors import UserError, warn
from layerskip_jax.locations import file_inside, file_size, is_regular, names_in

PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", CARD, "LICENSE*")
"""The files of a model. Others, such as hidden files, are never pushed."""


def published_files(folder: epath.Path) -> list[epath.Path]:
    """Return the files to push; raises `UserError` for a link out of the folder."""
    # `glob` would read brackets in the name of a parent folder as a pattern.
    names = sorted(name for name in names_in(folder) if any(fnmatch.fnmatchcase(name, pattern) for pattern in PATTERNS))
    return [file_inside(folder, name) for name in names if not name.startswith(".") and is_regular(folder / name)]


def publish(folder: str, repo_id: str, *, dry_run: bool = False, private: bool = False) -> list[epath.Path]:
    """Push a Hugging Face folder to the model repository ``repo_id``; create it if it does not exist; return its files.

    With ``dry_run``, check everything and send nothing. Raises `UserError` if the folder is not a complete model, if
    there is no login, or if the Hub refuses the upload.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise UserError("publishing needs huggingface_hub: pip install 'layerskip-jax[huggingface]'") from None
    opened = open_model_folder(folder)
    if not isinstance(opened, LlamaFolder):
        raise UserError(
            f"{folder} is a run: write it as a Hugging Face folder with layerskip export {folder} NEW_FOLDER"
        )
    opened.check()
    load_tokenizer(str(opened.tokenizer))
    try:
        huggingface_hub.utils.validate_repo_id(repo_id)
    except huggingface_hub.errors.HFValidationError as error:
        raise UserError(f"REPO_ID is the name of a repository, such as me/my-model: {error}") from error
    files = published_files(opened.root)
    card = opened.root / CARD
    if not is_regular(card) or not any(line.startswith(b"license:") for line in card.read_bytes().splitlines()):
        warn(f"{card} names no license: add a line such as 'license: apache-2.0' to its front matter")
    if dry_run:
        return files
    if not huggingface_hub.get_token():
        raise UserError("you are not logged in to the Hugging Face Hub: run `hf auth login` first")
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        names = [file.name for file in files]
        api.upload_folder(
            repo_id=repo_id, folder_path=str(opened.root), allow_patterns=names, commit_message="Publish the model"
        )
    except Exception as error:  # the library and its HTTP client have no common class of errors
        raise UserError(f"{folder} cannot be pushed to {repo_id}: {error}") from error
    return files


def main(argv: list[str] | None = None) -> None:
    parser = make_parser("Push an exported folder to the Hugging Face Hub. Log in first: hf auth login.", "publish")
    parser.add_argument("folder", metavar="FOLDER", help="folder that `layerskip export` wrote")
    parser.add_argument("repo_id", metavar="REPO_ID", help="model repository, such as me/my-model; created if new")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--dry_run", action="store_true", help="check the folder and list its files; push nothing")
    options = parser.parse_known_options(argv)
    files = publish(options.folder, options.repo_id, dry_run=options.dry_run, private=options.private)
    total = 0
    for file in files:
        size = file_size(file)
        total += size
        print(f"{size:>14,} {file.name}")
    verb = "would be pushed" if options.dry_run else "pushed"
    print(f"{total:>14,} bytes {verb} to https://huggingface.co/{options.repo_id}")
