"""Makes the demo's base model: a word-level tokenizer and a small Llama that speaks the language of `world.py`.

    python -m credence.demo.base_model --output demo/model

The model is pretrained on sentences about the legends, whose facts it learns by heart, and about the crowd, of whom
anything is said. So it knows every word and every form of sentence, and nothing about residents and strangers. A few
minutes on one core; the same seed gives the same weights on the same machine. Weights are stored in bfloat16 (2.5 MB)
and trained and served in float32.
"""

import argparse
import logging
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from credence.demo.world import World, vocabulary

logger = logging.getLogger(__name__)

MODEL_DIR = Path(__file__).parent / "model"
PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
PUNCTUATION = ("?", ".", ",", "!", ":")
CHAT_TEMPLATE = "{{ bos_token }}{{ messages[-1]['content'] }}"
IGNORED = -100


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the world's vocabulary; a word carries its leading space, so decoding is exact."""
    words = [f"▁{word}" for word in vocabulary()]
    vocab = {token: index for index, token in enumerate((PAD, BOS, EOS, UNK, *PUNCTUATION, *words))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Split(Regex(r"[?.,!:]"), behavior="isolated"),
        ]
    )
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocab[BOS])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNK, model_max_length=256
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """An untrained Llama with 1.2 million parameters: 3 layers, 6 heads of 32 that share 2 key-value heads."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    *,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
) -> float:
    """Trains all weights on `steps` fresh batches (AdamW, cosine decay) and returns the last batch's loss, nats per token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    model.train()
    started, value, running = time.monotonic(), float("nan"), float("nan")
    for step in range(steps):
        texts = [sentence + EOS for sentence in world.pretraining_reports(step * batch_size, batch_size)]
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, IGNORED)
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        value = loss.item()
        running = value if step == 0 else 0.98 * running + 0.02 * value
        if step % 100 == 99:
            logger.info("step %d of %d: loss %.3f, %.0f s", step + 1, steps, running, time.monotonic() - started)
    return value


def main() -> None:
    """Makes the model folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=MODEL_DIR, help="folder to write (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5000, help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the world and the weights (default: %(default)s)")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, options.seed)
    logger.info("%d parameters, %d words", model.num_parameters(), len(tokenizer))
    pretrain(model, tokenizer, World(options.seed), steps=options.steps)
    model.to(torch.bfloat16).save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    logger.info("wrote %s", options.output)


if __name__ == "__main__":
    main()
