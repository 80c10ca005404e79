"""Models and tokenizers from folders, or new ones from a shape; whatever is wrong with a folder becomes a ValueError that names it."""

import hashlib
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, Qwen3Config
from transformers.utils import logging as transformers_logging

from opd.config.choices import nearest
from opd.config.load import PACKAGED

transformers_logging.disable_progress_bar()
logging.getLogger("transformers").setLevel(logging.ERROR)

UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, AttributeError, SafetensorError)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
SAMPLED_BYTES = 1 << 20
HUB_SECONDS = 10.0
HUB_FAILURES = (HFValidationError, *HfHubHTTPError.__bases__)  # httpx's error, of the httpx that huggingface_hub brings, and OSError


def find_model(path: str) -> str:
    """A folder here, a folder inside the package, or a hub name; ValueError when a local-looking path is not there."""
    for candidate in (Path(path), *(root.parent / path for root in PACKAGED)):
        if (candidate / "config.json").is_file():
            return str(candidate)
    shelves = [root.parent / "models" for root in PACKAGED]
    known = sorted({config.parent.name for shelf in shelves for config in shelf.glob("*/config.json")})
    if path.startswith("runs/") and (maker := maker_of(path)):
        raise ValueError(f"no model folder {path!r} yet: make it first with `opd train {maker}` (on a GPU with hardware=gpu1)")
    if path.startswith((".", "/", "~", "models/", "runs/")) or path.count("/") > 1 or Path(path).exists():
        raise ValueError(
            f"no model folder {path!r} (no config.json there){nearest(Path(path).name, known)}; give a Hugging Face folder, a hub name "
            f"(owner/name) or one of {', '.join(f'models/{name}' for name in known) or 'the embedded models'}"
        )
    return path


def maker_of(path: str) -> str:
    """The shipped recipe whose run leaves its model in this folder (runs/NAME/model), or ""."""
    parts = Path(path).parts
    own = len(parts) == 3 and parts[2] == "model" and any((root / f"runs/{parts[1]}.yaml").is_file() for root in (Path("recipes"), *PACKAGED))
    return f"recipes/runs/{parts[1]}.yaml" if own else ""


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The folder's tokenizer; one without a pad token pads with its end of sequence."""
    if Path(path).is_dir() and not any((Path(path) / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(f"model folder {path!r} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}); save the tokenizer beside the weights")
    tokenizer = _from_pretrained(AutoTokenizer, path)
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(path: str, **options: Any) -> torch.nn.Module:
    """The folder's causal language model. Raises ValueError where weights are missing: transformers would make them up."""
    load_config(path)
    model, found = _from_pretrained(AutoModelForCausalLM, path, output_loading_info=True, **options)
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(f"model {path!r} lacks {len(missing)} weights (first: {missing[0]}); the folder is incomplete: copy or export it again")
    broken = [name for name, tensor in model.named_parameters() if not tensor.sum(dtype=torch.float32).isfinite()]
    if broken:
        raise ValueError(f"model {path!r} holds weights that are not finite (first: {broken[0]}); take an earlier checkpoint or copy it again")
    return model


def load_config(path: str) -> Any:
    """The folder's configuration. Raises ValueError for a model of more than text."""
    config = _from_pretrained(AutoConfig, path)
    check_kind(config, path)
    return config


def check_kind(config: Any, path: str) -> None:
    """Raises ValueError for models that see or hear, and for those that are no causal language models."""
    senses = [key for key in ("vision_config", "audio_config") if getattr(config, key, None) is not None]
    if senses:
        raise ValueError(f"model {path!r} has a {senses[0]}: opd trains text models only; choose a text checkpoint of the family")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model {path!r} is an encoder-decoder model: opd trains causal language models only")


def num_experts(config: Any) -> int:
    """Experts of a mixture-of-experts model, 0 for a dense one."""
    text = config.get_text_config()
    return next((n for key in ("num_experts", "num_local_experts", "n_routed_experts") if (n := getattr(text, key, None))), 0)


def generation_config(path: str) -> GenerationConfig | None:
    """The folder's generation settings; None where it has none."""
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:
        return None


def new_model(config: Any, seed: int, *, device: torch.device | str = "cpu", **options: Any) -> torch.nn.Module:
    """A model of this configuration on `device`, its weights drawn there from the seed (another device draws others).

    Raises ValueError for one that transformers cannot build.
    """
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        try:
            return AutoModelForCausalLM.from_config(config, **options)
        except UNREADABLE as error:
            raise ValueError(f"cannot make a model from model.shape or model.path: {_first_line(error)}") from error


def new_config(shape: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Qwen3Config:
    """A small Qwen3 configuration; `shape` overrides its sizes."""
    known = set(Qwen3Config().to_dict())
    unknown = sorted(set(shape) - known)
    if unknown:
        raise ValueError(f"model.shape: Qwen3 has no {unknown[0]!r}{nearest(unknown[0], known)}; see transformers.Qwen3Config")
    wrong = [f"{key}={value!r}" for key, value in shape.items() if key in SIZES and (not isinstance(value, int) or value < 1)]
    if wrong:
        raise ValueError(f"model.shape: {', '.join(wrong)}: sizes are whole numbers from 1 on")
    sizes = {**SIZES, "intermediate_size": 3 * shape.get("hidden_size", SIZES["hidden_size"]), "tie_word_embeddings": True}
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    try:
        return Qwen3Config(**{**sizes, **ids, **shape})
    except UNREADABLE as error:
        raise ValueError(f"model.shape: {_first_line(error)}") from error


SIZES = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 512,
}  # fmt: skip


def check_rows(model: torch.nn.Module, vocab_size: int, what: str) -> None:
    """Raises ValueError for a head with fewer rows than tokens; more rows are padding."""
    rows = model.get_output_embeddings().weight.shape[0]
    if rows < vocab_size:
        raise ValueError(f"{what}: the model's head has {rows} rows, fewer than the tokenizer's {vocab_size} tokens: they do not belong together")


def check_same_tokens(ours: Mapping[str, int], theirs: Mapping[str, int], teacher: str) -> None:
    """Raises ValueError unless both vocabularies give every token the same id."""
    differing = sorted(token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token))
    if differing:
        raise ValueError(
            f"teacher {teacher!r} has another tokenizer than the student ({len(theirs)} tokens against {len(ours)}; first difference "
            f"{differing[0]!r}): token-level distillation needs the same ids. Choose a teacher of the student's family, "
            "or let it keep its tokenizer, {external: {path: FOLDER, tokenizer: own}}, with the methods alm, gold or uld."
        )


def fingerprint(folders: Collection[str]) -> str:
    """Names weights on disk by the sizes, beginnings and ends of their files, those of the hub by their commit, where it is known."""
    digest = hashlib.blake2b(digest_size=8)
    for folder in folders:
        for path in sorted(Path(folder).glob("*.safetensors")):
            digest.update(_ends(path))
        if not Path(folder).is_dir():
            digest.update(hub_commit(folder).encode())
    return digest.hexdigest()


def hub_commit(name: str) -> str:
    """The commit of a hub model: the newest, where the hub answers within HUB_SECONDS; else the one in the cache; "" where neither knows."""
    try:
        return HfApi().model_info(name, timeout=HUB_SECONDS).sha or ""
    except HUB_FAILURES:  # from_pretrained then reads the cache as well, or says what is wrong
        config = try_to_load_from_cache(name, "config.json")
        return Path(config).parent.name if isinstance(config, str) else ""


def content_hash(text: str, paths: Sequence[str], sampled: Sequence[str] = ()) -> str:
    """Names a text and the contents of files; of those that are sampled (larger than memory) size, beginning and end. A hub name has none."""
    digest = hashlib.blake2b(text.encode(), digest_size=8)
    for path in paths:
        file = Path(path).expanduser()
        if file.is_file():
            digest.update(_ends(file) if path in sampled else file.read_bytes())
    return digest.hexdigest()


def _ends(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        beginning = file.read(SAMPLED_BYTES)
        file.seek(max(0, size - SAMPLED_BYTES))
        return f"{path.name} {size} ".encode() + beginning + file.read()


def _from_pretrained(loader: Any, path: str, **options: Any) -> Any:
    try:
        return loader.from_pretrained(path, trust_remote_code=False, **options)
    except UNREADABLE as error:
        there = "" if Path(path).is_dir() else " (no such folder here; as a hub name it needs the network or a filled cache)"
        raise ValueError(f"cannot load {path!r}{there} with {loader.__name__}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before anything imports deepspeed, which else warns and probes
