"""A model whose answers are known, and questions to it."""

import torch
import transformers as hf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

CHARACTERS = ["[EOS]", "[PAD]", "\n", *map(chr, range(32, 127))]
SHARPNESS = 0.6  # of its predictions
SIZE = 128  # of its vocabulary and its states


def following(word="cat"):
    """The token that the model finds likeliest behind each: after the prompt's last newline it says this, and ends."""
    chain = [CHARACTERS.index(character) for character in ["\n", *word, "[EOS]"]]
    return dict(zip(chain, chain[1:]))


def save_parrot(folder, layers=1, word="cat"):
    """A GPT-2 without attention and MLP: of each token it knows one follower, and finds all others equally unlikely."""
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(CHARACTERS)}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[EOS]", pad_token="[PAD]").save_pretrained(folder)
    config = hf.GPT2Config(
        vocab_size=SIZE, n_embd=SIZE, n_layer=layers, n_head=1, n_positions=128, tie_word_embeddings=False,
        eos_token_id=0, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    model = hf.GPT2LMHeadModel(config)
    known = following(word)
    free = sorted(set(range(SIZE)) - set(known.values()))
    followers = [known.get(token) for token in range(SIZE)]
    followers = [free.pop(0) if follower is None else follower for follower in followers]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "c_proj" in name or "wpe" in name:
                parameter.zero_()
        model.transformer.wte.weight.copy_(torch.eye(SIZE))
        model.lm_head.weight.zero_()
        model.lm_head.weight[followers, range(SIZE)] = SHARPNESS
    model.save_pretrained(folder)
    return folder


def asked(answer, question="what?", **columns):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages} | columns
