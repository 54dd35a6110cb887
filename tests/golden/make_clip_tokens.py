"""Make clip_tokens.json: awkward phrases and the ids that transformers' CLIPTokenizer gives them.

    python tests/golden/make_clip_tokens.py bpe_simple_vocab_16e6.txt.gz

The merges file is OpenAI's. It lies in github.com/openai/CLIP (clip/bpe_simple_vocab_16e6.txt.gz) and in the wheel of
open_clip_torch (`pip download --no-deps open_clip_torch`, then open_clip/bpe_simple_vocab_16e6.txt.gz), SHA-256
924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a. It is not kept here.
The text is cleaned as in OpenAI's simple_tokenizer.py, which transformers leaves out.
"""

# ruff: noqa: RUF001 - ambiguous letters are the point

import gzip
import html
import json
import re
import sys
from pathlib import Path

import ftfy
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

PHRASES = [
    "left slice",
    "The RED cup,  on the right!",
    "guy's shirt, they're not mine, I'll, we'd, don't, 've, DON'T",
    "3rd one from the left, no. 42, $5.99, 50%",
    "café naïve jalapeño",
    "e\u0301cole (combining accent)",
    "pizza 🍕 and 🤷‍♀️ 👩‍👩‍👧",
    "fish &amp; chips &lt;b&gt; &amp;amp; &#39;quoted&#39; &eacute;",
    "“curly” ‘quotes’ the man’s hat",
    "mojibake: schÃ¶n and donâ€™t",
    "under_score __init__ _",
    "你好世界 日本語テキスト 한국어",
    "ﾊﾝｶｸ ＦＵＬＬ ﬁ ﬂ",
    "नमस्ते दुनिया สวัสดี مرحبا",
    "zero\u200bwidth \u200d joiner \ufeff",
    "control\x00 \x07 \x1b[31m \x1c \x85 characters",
    "tabs\tand\nnew\r\nlines\u2028and\u00a0other\u3000spaces",
    "½ ² ① Ⅷ ٣٤ 𝟘",
    "İstanbul straße ΑΣ ΑΣΑ",
    "!!! ... ?!, '' ' \"",
    "<|endoftext|> <|startoftext|>a<|endoftext|><|endoftext|>",
    "&lt;|EndOfText|&gt;",
    "person</w> #tag @name a/b\\c e-mail left-most",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "\ud800 lone surrogate \U0010ffff",
    "word " * 200,
    "x" * 300,
    "",
    "   \n",
]
LENGTH = 77


def clean(text: str) -> str:
    """OpenAI's cleaning."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip().lower()


def main() -> None:
    """Write clip_tokens.json beside this file."""
    lines = gzip.decompress(Path(sys.argv[1]).read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=merges)
    rows = [tokenizer(clean(text), truncation=True, max_length=LENGTH)["input_ids"] for text in PHRASES]
    entries = [{"text": text, "ids": ids} for text, ids in zip(PHRASES, rows, strict=True)]
    text = "[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n"
    (Path(__file__).parent / "clip_tokens.json").write_text(text)


if __name__ == "__main__":
    main()
