"""Vocabulary of the built-in text task: the words that its rows and its tokenizer agree on.

The task draws rows from these words, the tiny models build a word-level tokenizer from them;
neither imports the other. Words hold no punctuation, so that any whitespace splitter keeps them.
"""

CATEGORY_OPENINGS: dict[str, str] = {
    "classification": "class",
    "information_extraction": "fact",
    "summarization": "summary",
    "brainstorming": "ideas",
    "creative_writing": "story",
    "open_qa": "answer",
    "closed_qa": "passage",
    "general_qa": "opinion",
}
"""Dolly's eight categories in the paper's order, and the word that opens each one's responses."""

WORD_CLASSES: dict[str, list[str]] = {
    "animals": ["ant", "bear", "crow", "deer", "eel", "fox", "goat", "hare", "ibex", "jay"],
    "tools": [
        "anvil",
        "brace",
        "chisel",
        "drill",
        "file",
        "gauge",
        "jig",
        "knife",
        "lathe",
        "vise",
    ],
}
"""The two classes that a row is about; a class's index is its label, its name ends a response."""

FILLERS = ["the", "a", "of", "near", "under", "over", "and", "with", "by", "on", "some", "this"]
"""Words that say nothing about the label."""

MARKERS = ["category", "text", "response"]
"""Words that name the parts of a row, as the columns of a data set would."""


def synthetic_words() -> list[str]:
    """Every word of the language once, in a fixed order (token ids depend on it)."""
    words = [*MARKERS, *CATEGORY_OPENINGS, *CATEGORY_OPENINGS.values(), *WORD_CLASSES]
    for members in WORD_CLASSES.values():
        words.extend(members)
    return words + FILLERS
