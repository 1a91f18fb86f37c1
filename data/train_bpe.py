"""Trains a byte-level byte-pair encoding: python data/train_bpe.py --out FILE --size N FILES...

Byte-pair encoding (Sennrich et al. 2016) over GPT-2's split pattern. FILES are texts, folders or
globs. The output is tiktoken's own format, base64 of the token, a space, its rank: for --encoding
of run.py and data/prepare.py. data/shakespeare.tiktoken was made of the first nine tenths of the
text, so that what is set aside for validation stays unseen:

    python data/train_bpe.py --out NEW --size 1024 --share 0.9 data/shakespeare.txt
"""
import argparse
import base64
import sys
from collections import Counter, defaultdict
from pathlib import Path

import regex
from tiktoken_ext.openai_public import r50k_pat_str

sys.path.insert(0, str(Path(__file__).parents[1]))
from minitf.errors import Parser, require                                  # noqa: E402
from minitf.training import checkpoint, encoding as encodings              # noqa: E402


def main(arguments=None):
    """Parses the flags and trains. Whatever a user can get wrong: one line, exit status 2."""
    parser = Parser(prog="train_bpe.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILES", help="files, folders or globs")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a new rank file")
    parser.add_argument("--size", type=int, default=1024, metavar="N",
                        help="tokens, 256 of them single bytes (default: 1024)")
    parser.add_argument("--share", type=float, default=1.0,
                        help="of the text, from its beginning (default: 1)")
    flags = parser.parse_args(arguments)
    try:
        require(not flags.out.exists(), f"{flags.out} exists: it is not overwritten")
        require(256 <= flags.size <= 2**20, f"size must be 256 to {2**20}, not {flags.size}")
        require(0 < flags.share <= 1, f"share must be above 0 and at most 1, not {flags.share}")
        text = "".join(map(encodings.read_text, encodings.find_files(flags.files)))
        tokens = train(text[:int(len(text) * flags.share)], flags.size)
        lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
        checkpoint.write(flags.out, lambda file: file.writelines(lines))
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename or flags.out}: {error.strerror}")
    except MemoryError:
        parser.error("out of memory: --share takes less of the text")


def train(text, size):
    """The `size` byte strings of the encoding, by rank: 256 bytes, then always the commonest pair.

    ValueError where the text has too few pairs.
    """
    counts = Counter(word.encode() for word in regex.findall(r50k_pat_str, text))
    words = {word: [bytes([byte]) for byte in word] for word in counts}
    tokens, pairs, places = [bytes([byte]) for byte in range(256)], Counter(), defaultdict(set)

    def count(word, sign):
        for pair in zip(words[word], words[word][1:]):
            pairs[pair] += sign * counts[word]
            places[pair].add(word)

    for word in words:
        count(word, 1)
    while len(tokens) < size:
        best = max(pairs, key=lambda pair: (pairs[pair], pair), default=None)    # ties: the same on
        require(best is not None and pairs[best] > 0,                            # every machine
                f"the text has pairs for {len(tokens)} tokens only, not for {size}")
        tokens.append(best[0] + best[1])
        for word in places.pop(best):
            count(word, -1)
            words[word] = merge(words[word], best)
            count(word, 1)
        del pairs[best]
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
    main()
