"""The tokenizer of pocket: bytes, Qwen's special tokens, and whole words only where questions use them. No torch.

A byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909) whose merges are written rather than counted: every function
word of a question is one token when a space precedes it, and everything else, in particular every word that is read
from a picture, falls into single characters. Reading is then one skill, spelling what is seen, instead of thousands
of words.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen2Tokenizer

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)
ROLES = ("system", "user", "assistant")

# Qwen2.5-VL's layout of a conversation, without a default system text; images come where the user puts them.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

QUESTION_WORDS = """
a about above add after all among an and answer any are as at axis background bar bars before below between big
biggest both bottom brand by can category categories change chart circle color colors colour colours column compared
contain count decrease did difference digit digits display displayed do does drawn each equal exceed fewer fewest
figure first for from give given greater greatest group has have high higher highest how image in increase is it
item items label labels large larger largest last least left legend length less letter letters lie line lines long
low lower lowest many marked maximum mean median minimum more most much name next no not number numbers of on one
only or over part peak percent percentage picture pie point points present price printed rank ratio read rectangle
reach row same say says score second see seen segment series shape shapes share short show shown shows side sign
slice slices small smaller smallest square stand sum tall taller tallest tell text than that the there these third
this three times title to top total triangle two under value values versus was we were what when where which whose
white who why width with word words write written year you red green blue yellow black gray grey brown teal orange
purple pink cyan
""".split()
# Words that begin a question carry no space; only capitalised ones are merged, so that no word on a sign changes.
FIRST_WORDS = ("What", "Which", "How")


def _byte_characters() -> list[str]:
    """The printable stand-in of every byte value, in the order of GPT-2's byte-level BPE."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table, extra = {byte: chr(byte) for byte in plain}, 0
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(256 + extra)
            extra += 1
    return [table[byte] for byte in range(256)]


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The tokens with their ids, and the merges in the order of their priority."""
    characters = _byte_characters()
    space = characters[ord(" ")]
    tokens = {character: index for index, character in enumerate(characters)}
    merges: list[tuple[str, str]] = []
    for word in [space + word for word in dict.fromkeys(QUESTION_WORDS)] + list(FIRST_WORDS):
        for end in range(1, len(word)):
            if word[: end + 1] not in tokens:
                tokens[word[: end + 1]] = len(tokens)
                merges.append((word[:end], word[end]))
    return tokens, merges


def build_tokenizer() -> Qwen2Tokenizer:
    """Build the tokenizer; the same one every time.

    Returns:
        A fast tokenizer with Qwen's pre-tokenization (digits stand alone), special tokens and the chat template.
    """
    tokens, merges = vocabulary()
    arguments: dict[str, Any] = {"vocab": tokens, "merges": merges}
    tokenizer = Qwen2Tokenizer(**arguments, unk_token=END_OF_TEXT, eos_token=TURN_END, pad_token=END_OF_TEXT)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    # The words of the template are single tokens wherever they stand: five of them frame every question.
    tokenizer.add_tokens(list(ROLES))
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.padding_side = "left"
    return tokenizer
