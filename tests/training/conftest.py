"""A tiny random Llama with a byte-level tokenizer, and a small data set it can learn; made once per session, in milliseconds."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from credence.adapters.posterior import LoraFactors
from credence.training.config import LoraSettings, TrainConfig, load_config
from credence.training.modeling import add_lora, get_factors, load_base
from credence.training.predict import Predictor

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per byte, and two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "</s>": 1, **{symbol: index + 2 for index, symbol in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", chat_template=chat_template
    )


def make_base(
    folder: Path,
    chat_template: str | None = None,
    *,
    hidden_size: int = 32,
    intermediate_size: int = 48,
    context: int = 128,
) -> Path:
    """Writes a random two-layer Llama (4,000 parameters a layer) and its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer(chat_template).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are tiny: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model."""
    return make_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def chat_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model with a chat template."""
    return make_base(tmp_path_factory.mktemp("base") / "tiny-chat", CHAT_TEMPLATE)


@pytest.fixture
def predictor(base: Path) -> Predictor:
    """The tiny base model with a random LoRA; two rows a batch."""
    torch.manual_seed(2)
    model, sites = add_lora(load_base(base, "float32"), LoraSettings(r=4, alpha=8))
    for site in sites:
        torch.nn.init.normal_(site.mean.B, std=0.3)
    return Predictor(model, sites, pad_token=0, batch_size=2)


def draws_of(predictor: Predictor) -> list[dict[str, LoraFactors]]:
    """Three samples that predict differently."""
    mean = get_factors(predictor.sites)
    return [{n: LoraFactors(A=f.A + 0.3 * i, B=f.B) for n, f in mean.items()} for i in range(3)]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows (objects, or raw lines) to a JSON Lines file."""

    def write_rows(name: str, rows: Iterable[object]) -> Path:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write_rows


def label_rows(count: int, *, start: int = 0) -> list[dict[str, str]]:
    """Rows whose label is their first word; three labels."""
    names = ("dog", "cat", "bird")
    return [
        {"text": f"{names[i % 3]} {(i * 7) % 10}{(i * 3) % 10}", "label": names[i % 3]}
        for i in range(start, start + count)
    ]


@pytest.fixture
def train_file(write: Callable[..., Path]) -> Path:
    """24 label rows."""
    return write("train.jsonl", label_rows(24))


@pytest.fixture
def validation_file(write: Callable[..., Path]) -> Path:
    """12 other label rows."""
    return write("validation.jsonl", label_rows(12, start=24))


QUICK = [
    "train.max_steps=4",
    "train.batch_size=4",
    "lora.r=4",
    "lora.alpha=8",
    "release.ks=[2, 4]",
    "release.taus=[1, 10]",
    "release.map_rows=0",
]
METHOD_OPTIONS = {
    "map": ["train.learning_rate=0.01"],
    "monteclora": ["train.learning_rate=0.01", "method.epsilon=0.05"],
    "melora": ["train.learning_rate=0.01", "method.initial_sd=0.1"],
    "blob": ["train.learning_rate=0.01", "method.initial_sd=0.05"],
    "laplace": ["train.learning_rate=0.01"],
    "swa": ["train.learning_rate=0.01"],
    "swag": ["train.learning_rate=0.01"],
    "mcdropout": ["train.learning_rate=0.01", "lora.dropout=0.2"],
    "tfb": ["train.learning_rate=0.01", "method.samples=3", "method.max_rows=8"],
    "ensemble": ["train.learning_rate=0.01", "method.members=4"],
    "ivon": ["train.learning_rate=1", "method.ess=1e5", "method.hess_init=1e-2"],
}


def quick_config(method: str, *overrides: str) -> TrainConfig:
    """Four steps of a small adapter, with settings under which each method moves."""
    return load_config(None, [*QUICK, *METHOD_OPTIONS[method], *overrides])
