"""Tokenizers: a word-level one built in code for random models, and the settings of loaded ones.

The word-level vocabulary is that of the synthetic language; every other word becomes `<unk>`.
"""

from typing import TYPE_CHECKING, Any

from cola.synthetic_language import synthetic_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD, UNKNOWN, BEGIN, END = "<pad>", "<unk>", "<s>", "</s>"


def word_vocabulary() -> dict[str, int]:
    """Token ids: pad 0, unknown 1, begin 2, end 3, then the words of the synthetic language."""
    tokens = [PAD, UNKNOWN, BEGIN, END, *synthetic_words()]
    return {token: index for index, token in enumerate(tokens)}


def build_word_tokenizer(*, marks_ends: bool, padding_side: str) -> "PreTrainedTokenizerBase":
    """Builds a tokenizer that splits at blanks and punctuation and ignores case.

    Args:
        marks_ends: encloses a row in `<s>` and `</s>`, as encoders expect; decoders add none.
        padding_side: `left` or `right`.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import Lowercase
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocabulary = word_vocabulary()
    words = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    words.normalizer = Lowercase()
    words.pre_tokenizer = Whitespace()
    if marks_ends:
        words.post_processor = TemplateProcessing(
            single=f"{BEGIN} $A {END}",
            pair=f"{BEGIN} $A {END} $B {END}",
            special_tokens=[(token, vocabulary[token]) for token in (BEGIN, END)],
        )
    fast: Any = PreTrainedTokenizerFast  # its constructor is not typed
    tokenizer: PreTrainedTokenizerBase = fast(
        tokenizer_object=words,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        padding_side=padding_side,
        model_input_names=["input_ids", "attention_mask"],
    )
    return tokenizer


def load_tokenizer(
    location: str, *, padding_side: str, local_files_only: bool
) -> "PreTrainedTokenizerBase":
    """Loads a pretrained tokenizer; one without a pad token pads with its end token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        location, padding_side=padding_side, local_files_only=local_files_only
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
