"""What the demo's captions say, for all scripts of this folder: content x style x background, by a template."""

import random


ATTRIBUTES = ("content", "style", "background")
FULL_TEMPLATES = (
    "{a_content}, {style} style, on {a_background} background",
    "{a_content} in {style} style on {a_background} background",
    "{style} style {content}, {background} background",
)
# Captions need not name everything: an attribute that a caption leaves out is neither right nor wrong.
TEMPLATES = (*FULL_TEMPLATES, "{a_content} on {a_background} background", "{a_content}, {style} style", "{a_content}")
TEMPLATE_WEIGHTS = (4, 2, 1, 1, 1, 1)


def with_article(noun: str) -> str:
    """'fox' -> 'a fox', 'owl' -> 'an owl', 'grapes' -> 'grapes'."""
    if noun.endswith("s") and not noun.endswith(("ss", "us", "is")):
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def caption(row: dict[str, str], template: str = TEMPLATES[0]) -> str:
    return template.format(**row, a_content=with_article(row["content"]), a_background=with_article(row["background"]))


def made_up_word(contents: list[str], rng: random.Random) -> str:
    """The head of one content's name joined to the tail of another's: looks like a word, and is the name of nothing."""
    while True:
        head, tail = rng.choice(contents), rng.choice(contents)
        word = head[: rng.randint(2, 4)] + tail[-rng.randint(2, 5) :]
        if word not in contents:
            return word
