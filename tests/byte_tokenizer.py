"""A tokenizer of bytes: it knows every text, and decoding gives the text back."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD, BEGIN, END = 0, 1, 2


def byte_tokenizer(*, marks_ends: bool, **special: Any) -> "PreTrainedTokenizerBase":
    """With `marks_ends` a text is enclosed in `<s>` and `</s>`, as by BART."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    model = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    if marks_ends:
        model.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", BEGIN), ("</s>", END)]
        )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=model, **(names | special))
