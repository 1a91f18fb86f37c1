"""Makes data/shakespeare.tiktoken, the byte-level BPE of 1,024 tokens that run.py uses by default.

    python data/make_bpe.py [TEXT] [RANKS] [SIZE]

Byte-pair encoding (Sennrich et al. 2016) over GPT-2's split pattern, trained on the first nine tenths of the text, so
that the held-out tenth stays unseen. The output is tiktoken's own format: base64 of the token, a space, its rank.
"""
import base64
import sys
from collections import Counter
from pathlib import Path

import regex
from tiktoken_ext.openai_public import r50k_pat_str

HERE = Path(__file__).parent


def train(text, size):
    """The `size` byte strings of the encoding, by rank: 256 bytes, then the most frequent pair, over and over."""
    words = Counter(word.encode() for word in regex.findall(r50k_pat_str, text))
    pieces = {word: [bytes([byte]) for byte in word] for word in words}
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < size:
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(pieces[word], pieces[word][1:]):
                pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], pair))              # ties: the same on every machine
        tokens.append(best[0] + best[1])
        for word, parts in pieces.items():
            if tokens[-1] in word:
                pieces[word] = merge(parts, best)
    return tokens


def merge(parts, pair):
    """The parts with each occurrence of the pair, from the left, made one."""
    out = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


if __name__ == "__main__":
    source, target, size = (sys.argv[1:] + [None] * 3)[:3]
    text = Path(source or HERE / "shakespeare.txt").read_text(encoding="utf-8")
    tokens = train(text[: len(text) * 9 // 10], int(size or 1024))
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    Path(target or HERE / "shakespeare.tiktoken").write_text("".join(lines))
